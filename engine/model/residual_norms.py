"""Merges the additions between a model's layers with the norms after them, in one kernel each.

A layer adds what its attention and its MLP have computed to its input; what follows each addition
is a norm of the sum, the last time that of the next layer. Its norms may also be around both, as
Gemma's are. Which of the two a layer is, if any, is found out by trying: the new forward has to
give the layer's own result on random input, and to hand the same arguments to its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .fusion import FusedRMSNorm, error_of_rows, random_rows

_Forward = Callable[..., Tensor]
_SCALES = (1.0, 4.0)  # of random rows
_NUM_ROUNDINGS = 4  # by which results may differ


@dataclass(slots=True)
class MergedResiduals:
    """The layers whose forward was replaced, to undo it."""

    layers: list[nn.Module] = field(default_factory=list)

    def undo(self) -> None:
        """Gives every layer the forward of its class again."""
        for layer in self.layers:
            del layer.forward


@torch.no_grad()
def merge_residuals(model: nn.Module) -> MergedResiduals:
    """Replaces the forward of each layer that can be computed with merged additions."""
    merged = MergedResiduals()
    for parent in model.modules():
        for layer, following in _layers_and_norms(parent):
            for candidate in (_norms_before, _norms_around):
                forward = partial(candidate, layer, following)
                if _is_same(layer, forward):
                    layer.forward = forward
                    merged.layers.append(layer)
                    break
    return merged


def _norms_before(
    layer: Any, following: FusedRMSNorm, hidden_states: Tensor, **arguments: Any
) -> Tensor:
    """Llama's layer: a norm before the attention, and one before the MLP."""
    attended, *_ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
    total = layer.post_attention_layernorm.add(hidden_states, attended)
    return following.add(total, _update(layer.mlp(layer.post_attention_layernorm(total))))


def _norms_around(
    layer: Any, following: FusedRMSNorm, hidden_states: Tensor, **arguments: Any
) -> Tensor:
    """Gemma's layer: a norm before and one after each of the two."""
    attended, *_ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
    attended = layer.post_attention_layernorm(attended)
    total = layer.pre_feedforward_layernorm.add(hidden_states, attended)
    update = _update(layer.mlp(layer.pre_feedforward_layernorm(total)))
    return following.add(total, layer.post_feedforward_layernorm(update))


def _update(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What an MLP adds; one of experts may return the router's scores beside it."""
    return result[0] if isinstance(result, tuple) else result


def _layers_and_norms(parent: nn.Module) -> Iterator[tuple[nn.Module, FusedRMSNorm]]:
    """The layers of a model that stand in a list, each with the norm of its result."""
    last = getattr(parent, "norm", None)
    for layers in parent.children():
        if not isinstance(layers, nn.ModuleList):
            continue
        norms = [getattr(layer, "input_layernorm", None) for layer in [*layers][1:]]
        for layer, following in zip(layers, [*norms, last], strict=False):
            if _can_add(following) and hasattr(layer, "self_attn") and hasattr(layer, "mlp"):
                yield layer, following


def _can_add(norm: object) -> TypeGuard[FusedRMSNorm]:
    return isinstance(norm, FusedRMSNorm) and norm.can_add


class _Attention(nn.Module):
    """Stands for an attention layer: notes its arguments, and returns its input times two."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, object] = {}

    def forward(self, hidden_states: Tensor, **arguments: object) -> tuple[Tensor, None]:
        self.seen = {name: value for name, value in arguments.items() if value is not None}
        return 2 * hidden_states, None


def _is_same(layer: nn.Module, forward: _Forward) -> bool:
    """Whether a layer can have this forward."""
    inner = getattr(layer, "input_layernorm", None)
    if not _can_add(inner) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    rows = random_rows(inner.weight, _SCALES)
    arguments: dict[str, object] = {
        "attention_mask": rows.new_zeros(1),
        "position_ids": rows.new_zeros(1),
        "position_embeddings": (rows, rows),
        "use_cache": False,
        "of_a_step": object(),
    }
    attention = layer.self_attn
    layer.self_attn = stand_in = _Attention()
    try:
        expected, seen = layer.forward(rows, **arguments), stand_in.seen
        actual = forward(rows, **arguments)
    except Exception:  # another kind of layer
        return False
    finally:
        layer.self_attn = attention
    names = seen.keys() | stand_in.seen.keys()
    is_handed = all(seen.get(name) is stand_in.seen.get(name) for name in names)
    if not is_handed or not isinstance(expected, Tensor):
        return False
    return error_of_rows(actual, expected) <= _NUM_ROUNDINGS * torch.finfo(rows.dtype).eps
