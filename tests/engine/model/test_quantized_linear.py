"""Linear layers over quantised weights, as far as torch has their products on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.model.quantized_linear import Fp8Linear, Int4Linear, Int8Linear, QuantizedLinear
from tests.engine.model.quantized import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS: tuple[type[QuantizedLinear], ...] = (Int8Linear, Int4Linear, Fp8Linear)


class TestLayers:
    """Each kind of layer."""

    @pytest.mark.parametrize(
        ("kind", "bound"), [(Int8Linear, 0.015), (Int4Linear, 0.12), (Fp8Linear, 0.05)]
    )
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_are_close_to_the_layer_they_replace(
        self, kind: type[QuantizedLinear], bound: float, has_bias: bool
    ) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(256, 96, bias=has_bias)
        layer = kind.from_linear(linear)
        for shape in ((256,), (1, 5, 256), (40, 256), (0, 256)):
            x = torch.randn(shape)
            y = layer(x)
            assert y.shape == (*shape[:-1], 96)
            assert y.dtype is x.dtype
            if x.numel():
                assert relative_error(y, linear(x)) < bound
        transposed = torch.randn(256, 7).t()
        assert torch.equal(layer(transposed), layer(transposed.contiguous()))

    @pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
    def test_compute_each_row_independently(self, kind: type[QuantizedLinear]) -> None:
        layer = kind.from_linear(nn.Linear(128, 64))
        x = torch.randn(70, 128)
        together = layer(x)
        assert all(torch.equal(layer(x[i : i + 1]), together[i : i + 1]) for i in range(len(x)))

    @pytest.mark.parametrize("kind", LAYERS)
    def test_keep_nan_in_its_row(self, kind: type[QuantizedLinear]) -> None:
        layer = kind.from_linear(nn.Linear(128, 64))
        x = torch.randn(3, 128)
        x[1, 7] = torch.nan
        finite = layer(x).isfinite()
        assert finite[::2].all()
        assert not finite[1].any()

    @pytest.mark.parametrize("kind", LAYERS)
    def test_refuse_shapes_that_torch_does_not_multiply(self, kind: type[QuantizedLinear]) -> None:
        assert kind.fits(torch.empty(64, 128))
        assert not kind.fits(torch.empty(64, 129))
        assert not kind.fits(torch.empty(65, 128))

    @pytest.mark.parametrize("kind", LAYERS)
    def test_replace_conv1d_as_well(self, kind: type[QuantizedLinear]) -> None:
        torch.manual_seed(0)
        conv = Conv1D(48, 64)  # GPT-2's, whose weight is [in, out]
        x = torch.randn(4, 64)
        assert relative_error(kind.from_linear(conv)(x), conv(x)) < 0.12

    def test_of_four_bits_have_sixteen_values_in_a_group(self) -> None:
        linear = nn.Linear(128, 16, bias=False)
        weight = Int4Linear.from_linear(linear)(torch.eye(128)).t()
        groups = weight.unflatten(1, (-1, 64)).flatten(0, 1)
        assert all(len(group.unique()) <= 16 for group in groups.mul(1e4).round())
        span = linear.weight.detach().unflatten(1, (-1, 64)).flatten(0, 1)
        steps = (span.amax(1) - span.amin(1)) / 15
        difference = (groups - span).abs().amax(1)
        assert (difference <= 0.6 * steps).all()
