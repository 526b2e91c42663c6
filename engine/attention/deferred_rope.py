"""Puts a model's rotation of query and key off until attention, which can do it while it writes.

Most models call a function of their module, `apply_rotary_pos_emb`, and hand what it returns to
attention as it is. `defer_rotation` gives their layers one that returns query and key as they are,
and leaves a note at the query of what is still to be done. Nothing but the layers of this one model
changes: each gets its own copy of its forward method, which sees the other function by that name.

A model that uses the results in between, or rotates in another way, would compute nonsense. So the
logits must be compared before it serves; `restore_rotation` takes everything back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_FUNCTION = "apply_rotary_pos_emb"
_NOTE = "tokenwire_rotation"


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation that is still to be done.

    `cos` and `sin` [1, num_tokens, rotary_dim] are those of the first `rotary_dim` elements of a
    head; `stock` is the model's own function.
    """

    stock: Callable[..., tuple[Tensor, Tensor]]
    cos: Tensor
    sin: Tensor

    def apply(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Does it, as the model would have done."""
        return self.stock(query, key, self.cos, self.sin)


def pending_rotation(query: Tensor) -> Rotation | None:
    """What is still to be done to this query and its key."""
    rotation = getattr(query, _NOTE, None)
    assert rotation is None or isinstance(rotation, Rotation)
    return rotation


def defer_rotation(model: nn.Module) -> int:
    """Defers the rotation in all layers that have one of the usual kind; returns how many do."""
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
    """Whether a layer attends, and calls the function by its name."""
    forward = type(module).forward
    return (
        hasattr(module, "layer_idx")
        and isinstance(forward, FunctionType)
        and _FUNCTION in forward.__code__.co_names
        and _FUNCTION in forward.__globals__
    )


def _deferred(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Stands where the model's function stood."""

    def apply_rotary_pos_emb(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any
    ) -> Any:
        if rest or options or cos.shape[0] != 1 or cos.dim() != 3:  # not the usual kind
            return stock(query, key, cos, sin, *rest, **options)
        setattr(query, _NOTE, Rotation(stock, cos, sin))
        return query, key

    return apply_rotary_pos_emb
