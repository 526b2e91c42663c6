"""Defers a model's rotary embedding of query and key to attention, which fuses it into its write.

Most models call a function of their module, `apply_rotary_pos_emb`, and pass its results to
attention unchanged. `defer_rotation` gives their layers a function that returns query and key
unrotated, and attaches the pending `Rotation` to the query tensor. Only the layers of this one
model change: each gets its own copy of its forward method, in which the name means that function.

A model that uses the rotated tensors before attention, or rotates in another way, would compute
wrong results. So its logits must be compared before it serves; `restore_rotation` undoes the
change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_FUNCTION = "apply_rotary_pos_emb"
_ATTRIBUTE = "tokenwire_rotation"  # of a query tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotary embedding that is not applied yet.

    `cos` and `sin` [1, num_tokens, rotary_dim] are those of the first `rotary_dim` elements of a
    head; `stock` is the model's own function.
    """

    stock: Callable[..., tuple[Tensor, Tensor]]
    cos: Tensor
    sin: Tensor

    def apply(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Applies it with the model's own function; returns the rotated query and key."""
        return self.stock(query, key, self.cos, self.sin)


def pending_rotation(query: Tensor) -> Rotation | None:
    """The rotary embedding that is still to be applied to this query and its key, if any."""
    rotation = getattr(query, _ATTRIBUTE, None)
    assert rotation is None or isinstance(rotation, Rotation)
    return rotation


def defer_rotation(model: nn.Module) -> int:
    """Defers the rotation in all layers that call the usual function; returns how many do."""
    layers = [module for module in model.modules() if _can_defer(module)]
    for layer in layers:
        forward = type(layer).forward
        names = forward.__globals__
        names = {**names, _FUNCTION: _deferred(names[_FUNCTION])}
        copy = FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        copy.__kwdefaults__ = forward.__kwdefaults__
        layer.forward = MethodType(copy, layer)
    return len(layers)


def restore_rotation(model: nn.Module) -> None:
    """Gives all layers their own forward methods back."""
    for module in model.modules():
        if _can_defer(module):
            vars(module).pop("forward", None)


def _can_defer(module: nn.Module) -> bool:
    """Whether it is an attention layer that calls the function by its name."""
    forward = type(module).forward
    return (
        hasattr(module, "layer_idx")
        and isinstance(forward, FunctionType)
        and _FUNCTION in forward.__code__.co_names
        and _FUNCTION in forward.__globals__
    )


def _deferred(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement for the model's function that only notes the rotation."""

    def apply_rotary_pos_emb(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any
    ) -> Any:
        if rest or options or cos.shape[0] != 1 or cos.dim() != 3:  # not the usual call
            return stock(query, key, cos, sin, *rest, **options)
        setattr(query, _ATTRIBUTE, Rotation(stock, cos, sin))
        return query, key

    return apply_rotary_pos_emb
