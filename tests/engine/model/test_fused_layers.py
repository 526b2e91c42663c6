"""Fused norms and MLPs, one layer at a time: which layers are replaced, and how they round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from engine.model import fusion
from engine.model.fusion import FusedMLP, fuse
from tests.engine.model.fused_kernels import native_kernels, triton_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.usefixtures("one_thread"),
]

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


class Around(nn.Module):
    """A parent of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def make_mlp(kind: type[nn.Module] = LlamaMLP, activation: str = "silu", **sizes: Any) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(**SIZES | {"hidden_act": activation} | sizes)).eval()


class Scaled(LlamaRMSNorm):
    """An RMS norm times a number."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 1.01 * super().forward(hidden_states)


class Centred(LlamaRMSNorm):
    """A norm that subtracts the mean first."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OtherEpsilon(LlamaRMSNorm):
    """Has an epsilon that it does not use."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * (hidden_states * scale)


class Gated(LlamaRMSNorm):
    """Takes a second input."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


class Swapped(LlamaMLP):
    """The activation is on up instead of gate."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


class Clamped(LlamaMLP):
    """Clamps the result."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e-3, 1e-3)


class Wrapped(nn.Linear):
    """A subclass, whose weight other modules may read."""


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_scales(layer: LlamaMLP) -> LlamaMLP:
    layer.up_proj.weight_scale = nn.Parameter(torch.ones(1))
    return layer


def with_another_linear(layer: LlamaMLP) -> LlamaMLP:
    layer.gate_proj = Wrapped(64, 96, bias=False)
    return layer


LOOKALIKES: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(64),
    "layer norm without bias": lambda: nn.LayerNorm(64, bias=False),
    "group norm": lambda: nn.GroupNorm(4, 64),
    "linear": lambda: nn.Linear(64, 1),
    "scaled": lambda: Scaled(64),
    "centred": lambda: Centred(64),
    "epsilon": lambda: OtherEpsilon(64),
    "gated norm": lambda: Gated(64),
    "hooks": lambda: with_hook(LlamaRMSNorm(64)),
    "swapped": lambda: make_mlp(Swapped),
    "clamped": lambda: make_mlp(Clamped),
    "relu": lambda: make_mlp(activation="relu"),
    "exact gelu": lambda: make_mlp(activation="gelu"),
    "another gelu": lambda: make_mlp(activation="quick_gelu"),
    "more tensors": lambda: with_scales(make_mlp()),
    "another linear": lambda: with_another_linear(make_mlp()),
}


class TestLayers:
    """Single layers."""

    @pytest.mark.parametrize("make", LOOKALIKES.values(), ids=LOOKALIKES)
    def test_that_only_look_similar_are_not_replaced(self, make: Callable[[], nn.Module]) -> None:
        for kernels, dtype in (
            (native_kernels(), torch.float32),
            (triton_kernels(), torch.bfloat16),
        ):
            layer = make().eval().to(dtype)
            around = Around(layer)
            assert fuse(around, kernels) == fusion.Fusion()
            assert around.layer is layer

    def test_with_shared_weights_are_not_replaced(self) -> None:
        first, second = make_mlp(), make_mlp()
        second.up_proj.weight = first.up_proj.weight
        third = make_mlp()
        third.up_proj = first.up_proj
        assert fuse(nn.ModuleList([first, second, third]), native_kernels()).num_mlps == 0

    def test_with_two_parents_are_replaced_in_both(self) -> None:
        around = Around(make_mlp(Phi3MLP))
        both = nn.ModuleList([around, Around(around.layer)])
        assert fuse(both, native_kernels()).num_mlps == 1
        assert isinstance(both[0].layer, FusedMLP)
        assert both[0].layer is both[1].layer

    def test_with_biases_are_fused(self) -> None:
        layer = make_mlp(mlp_bias=True)
        for name in ("gate_proj", "up_proj", "down_proj"):
            nn.init.normal_(getattr(layer, name).bias)
        around, x = Around(layer), torch.randn(5, 64)
        expected = layer(x)
        assert fuse(around, native_kernels()).num_mlps == 1
        torch.testing.assert_close(around.layer(x), expected, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm])
    @pytest.mark.parametrize("width", [8, 24, 128, 1000])
    def test_norms_on_a_gpu_round_as_transformers_does(
        self, kind: type[nn.Module], width: int
    ) -> None:
        around = Around(kind(width).half())
        nn.init.normal_(around.layer.weight)
        layer = around.layer
        assert fuse(around, triton_kernels()).num_norms == 1
        x = torch.randn(2, 9, 3, width).half()
        part = torch.randn(1, 7, 5 * width).half()[..., width : 4 * width]  # of a merged product
        heads = part.unflatten(-1, (3, width))
        for rows in (x, x.transpose(1, 2), x[:, ::2], heads, heads[:, :1], heads.transpose(1, 2)):
            actual, expected = around.layer(rows), layer(rows)
            assert actual.dtype is expected.dtype
            # Sums are computed in another order, which changes a few roundings.
            assert (actual != expected).float().mean() < 0.01
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=2e-3)

    def test_norms_of_heads_of_a_merged_product_copy_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from engine.kernels import triton_elementwise

        x = torch.randn(1, 4, 6 * 16)[..., 16:48].unflatten(-1, (2, 16))
        monkeypatch.setattr(Tensor, "contiguous", None)  # a call of it fails
        options = {"weight_offset": 0.0, "rounds_early": True}
        found = triton_elementwise.rms_norm(x, torch.ones(16), 1e-5, **options)
        assert found.is_contiguous()
        wanted = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("width", [96, 1500])
    def test_gates_on_a_gpu_round_as_transformers_does(
        self, width: int, dtype: torch.dtype, activation: str
    ) -> None:
        around = Around(make_mlp(activation=activation, intermediate_size=width).to(dtype))
        layer, x = around.layer, torch.randn(2, 3, 64).to(dtype)
        assert fuse(around, triton_kernels()).num_mlps == 1
        tolerance = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
        with torch.inference_mode():
            error = fusion.error_of_rows(around.layer(x), layer(x))
        assert error < tolerance
