"""Which layers a model reads, besides calling them; those are neither packed nor quantised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.kernels.packed_linear import PackedLinear
from engine.model.layers import layers_read_by
from engine.model.passes import layers_in_use, pack_layers, quantize_model
from engine.model.quantization import Scheme
from engine.model.quantized_linear import Int8Linear
from engine.model.self_check import attach_paged_attention
from engine.protocol.errors import ModelLoadError
from tests.engine.model.architectures import ARCHITECTURES, CPU, PECULIAR, build_model
from tests.engine.native import kernels_for, needs_compiler

pytestmark = pytest.mark.usefixtures("one_thread")


class Reader(nn.Module):
    """Calls two layers, and reads the weight of one of them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.read, self.called = layers

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.read.weight.dtype)
        result = self.called(self.read(x))
        assert isinstance(result, Tensor)
        return result


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layers_are_told_by_whether_their_weight_is_read(kind: str) -> None:
    make = nn.Linear if kind == "linear" else lambda k, n: Conv1D(n, k)
    model = Reader(make(4, 4), make(4, 4))
    kinds = [type(layer) for layer in model.children()]
    assert layers_read_by(model, lambda: model(torch.ones(1, 4))) == {model.read}
    assert [type(layer) for layer in model.children()] == kinds


def test_layers_are_themselves_again_after_a_failure() -> None:
    model = Reader(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        layers_read_by(model, lambda: model(torch.ones(1, 5)))
    assert {type(layer) for layer in model.children()} == {nn.Linear}


@needs_compiler
def test_a_router_that_is_read_is_not_packed() -> None:
    loaded = attach_paged_attention(build_model(PECULIAR["hunyuan_v1_moe"]()), CPU, torch.float32)
    pack_layers(loaded, kernels_for("whole"), layers_in_use(loaded))
    kinds = {name: type(layer) for name, layer in loaded.model.named_modules()}
    assert {kind for name, kind in kinds.items() if name.endswith(".wg")} == {nn.Linear}
    assert {kind for name, kind in kinds.items() if name.endswith("_proj")} == {PackedLinear}


@needs_compiler
def test_packing_that_changes_the_logits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = attach_paged_attention(build_model(ARCHITECTURES["llama"]()), CPU, torch.float32)
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: x.new_ones(*x.shape[:-1], 1))
    with pytest.raises(ModelLoadError, match="LlamaForCausalLM cannot be packed"):
        pack_layers(loaded, kernels_for("whole"))


def test_a_router_that_is_read_is_not_quantised() -> None:
    loaded = attach_paged_attention(build_model(PECULIAR["hunyuan_v1_moe"]()), CPU, torch.float32)
    left = layers_in_use(loaded)
    object.__setattr__(loaded, "scheme", Scheme("int8", Int8Linear.from_linear, lambda _: True))
    quantize_model(loaded, left)
    kinds = {name: type(layer) for name, layer in loaded.model.named_modules()}
    assert {kind for name, kind in kinds.items() if name.endswith(".wg")} == {nn.Linear}
    assert Int8Linear in kinds.values()
