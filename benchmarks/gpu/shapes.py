"""Shapes of models that people serve, as the kernels see them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShape:
    """What the kernels of one model are called with.

    Attributes:
        name: of the model.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of all three.
        hidden: width of a row that is normalised.
        intermediate: width of a gate.
        vocab_size: of the logits.
        window: of the layers that have one; 0 for none.
        has_sinks: whether each head has an extra logit.
        norm_offset: added to the weights of norms.
        rounds_early: see `rms_norm`.
        activation: of the gate.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab_size: int
    window: int = 0
    has_sinks: bool = False
    norm_offset: float = 0.0
    rounds_early: bool = True
    activation: Literal["silu", "gelu_tanh"] = "silu"


LLAMA_8B = KernelShape(
    name="Llama-3.1-8B",
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=4096,
    intermediate=14_336,
    vocab_size=128_256,
)
SHAPES = (
    LLAMA_8B,
    KernelShape(
        name="Qwen3-0.6B",
        heads=16,
        kv_heads=8,
        head_dim=128,
        hidden=1024,
        intermediate=3072,
        vocab_size=151_936,
    ),
    KernelShape(
        name="Gemma-3-4B",
        heads=8,
        kv_heads=4,
        head_dim=256,
        hidden=2560,
        intermediate=10_240,
        vocab_size=262_208,
        window=1024,
        norm_offset=1.0,
        rounds_early=False,
        activation="gelu_tanh",
    ),
    KernelShape(
        name="gpt-oss-20b",
        heads=64,
        kv_heads=8,
        head_dim=64,
        hidden=2880,
        intermediate=2880,
        vocab_size=201_088,
        window=128,
        has_sinks=True,
    ),
)


def shrunk(shape: KernelShape) -> KernelShape:
    """The same kind of shape at a size for Triton's interpreter."""
    return replace(
        shape,
        heads=2 * (shape.heads // shape.kv_heads > 1) + 2,
        kv_heads=2,
        head_dim=32 if shape.head_dim > 128 else 16,
        hidden=48,
        intermediate=40,
        vocab_size=700,
        window=min(shape.window, 20),
    )
