"""The bias by positions of BLOOM, Falcon and MPT is that of transformers, in long texts as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, FalconConfig, MptConfig, PreTrainedModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_bias
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_bias
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt_bias

from engine.attention.linear_bias import LinearBias
from engine.kernels import cpu as cpu_kernels
from engine.model.architecture import num_positions
from engine.model.older.interface import use_interface
from engine.model.self_check import (
    attach_paged_attention,
    objection,
    paged_logits,
    relative_difference,
    stock_logits,
    tolerance,
)
from engine.protocol.errors import ModelLoadError
from tests.engine.model.architectures import CPU, PECULIAR, build_model
from tests.engine.native import needs_compiler

pytestmark = pytest.mark.usefixtures("one_thread")

BIASED = ("bloom", "falcon, biased", "mpt")
_SIZES: dict[str, Any] = {"vocab_size": 8, "num_hidden_layers": 1}


def bias_of(config: Any) -> LinearBias:
    model: PreTrainedModel = build_model(config)
    use_interface(model)
    biases = {id(part.linear_bias): part.linear_bias for part in model.modules() if _has(part)}
    (bias,) = biases.values()
    assert isinstance(bias, LinearBias)
    return bias


def _has(part: Any) -> bool:
    return getattr(part, "linear_bias", None) is not None


def falcon(num_heads: int) -> Any:
    sizes = {"hidden_size": 8 * num_heads, "num_attention_heads": num_heads}
    return FalconConfig(**_SIZES, **sizes, alibi=True)


def bloom(num_heads: int) -> Any:
    return BloomConfig(**_SIZES, hidden_size=8 * num_heads, n_head=num_heads)


def mpt(num_heads: int) -> Any:
    return MptConfig(vocab_size=8, n_layers=1, d_model=8 * num_heads, n_heads=num_heads)


KINDS: dict[str, tuple[Callable[[int], Any], Callable[[int, int], Tensor]]] = {
    "bloom": (bloom, lambda heads, n: bloom_bias(torch.ones(1, n), heads, torch.float32)),
    "falcon": (
        falcon,
        lambda heads, n: (
            falcon_bias(torch.ones(1, n, dtype=torch.long), heads, torch.float32) * 8**-0.5
        ),
    ),
    "mpt": (mpt, lambda heads, n: mpt_bias(heads, n)),
}


@pytest.mark.parametrize("num_heads", [1, 4, 12, 71])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_is_that_of_transformers(kind: str, num_heads: int) -> None:
    config, stock = KINDS[kind]
    positions = torch.arange(3000)
    actual = bias_of(config(num_heads)).between(positions[-1:], positions)[:, 0]
    expected = stock(num_heads, 3000)[:, 0]
    # what all keys have in common does not matter; beside it BLOOM has 3 digits left
    tolerance = 0.0 if kind == "falcon" else 5e-4
    shift = expected[:, -1:] - actual[:, -1:]
    torch.testing.assert_close(actual + shift, expected, rtol=0, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize("name", BIASED)
def test_logits_of_a_long_text_are_those_of_transformers(name: str) -> None:
    from engine.model.self_check import _Trial

    model = build_model(PECULIAR[name]())
    expected = stock_logits(model, 600)
    loaded = attach_paged_attention(model, CPU, torch.float32)
    kernels, trial = cpu_kernels.load(), _Trial(600, 16, torch.float32)
    assert kernels is not None
    assert relative_difference(paged_logits(loaded, kernels, trial), expected) < 1e-3
    for part in model.modules():  # a bias of half the size is not taken for the right one
        if _has(part):
            bias: Any = part.linear_bias
            part.linear_bias = LinearBias(bias.slopes / 2, bias.rounded_scale)  # type: ignore[assignment]
    assert objection(loaded, kernels, expected, trial) is not None
    assert tolerance(torch.float32) == 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [("alibi", False), ("alibi_bias_max", 16), ("prefix_lm", True), ("qk_ln", True)],
)
def test_an_mpt_that_transformers_computes_otherwise_is_refused(name: str, value: Any) -> None:
    config = MptConfig(vocab_size=32, d_model=32, n_heads=4, n_layers=2, attn_config={name: value})
    with pytest.raises(ModelLoadError, match=f"takes no notice of attn_config.{name}"):
        attach_paged_attention(build_model(config), CPU, torch.float32)


def test_texts_of_an_mpt_are_as_long_as_its_bias() -> None:
    config = MptConfig(vocab_size=32, d_model=32, n_heads=4, n_layers=1, max_seq_len=80)
    assert num_positions(config, 4096) == 80
    assert num_positions(bloom(2), 4096) == 4096
