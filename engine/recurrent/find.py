"""Finds the layers of a model that have a state, by watching what they put into a cache."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from .layer_state import LayerState, StateShape
from .recurrence import StatefulLayer

_CACHE_ARGUMENTS = ("cache_params", "past_key_values")  # as transformers' layers name it


@dataclass(frozen=True, slots=True)
class FoundLayers:
    """What the layers of a model put into its cache.

    Attributes:
        stateful: the layers that keep a state, by their indexes. Of modules inside each other it is
            the innermost.
        attending: the indexes of layers that cache keys and values.
    """

    stateful: dict[int, StatefulLayer] = field(default_factory=dict)
    attending: set[int] = field(default_factory=set)


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[FoundLayers]:
    """Watches one call of a model with a cache; what it finds is there after that call."""
    found = FoundLayers()
    hooks = [
        module.register_forward_hook(_Watch(found, name, argument), with_kwargs=True)
        for name, module, argument in _caching_modules(model)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _caching_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The modules of layers that take a cache: names, modules, the parameter's name."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            parameters = inspect.signature(module.forward).parameters
            for argument in _CACHE_ARGUMENTS:
                if argument in parameters:
                    yield name, module, argument
                    break


class _Watch:
    """Called after each call of a module; inner modules return first."""

    def __init__(self, found: FoundLayers, name: str, argument: str) -> None:
        self._found, self._name, self._argument = found, name, argument

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: object
    ) -> None:
        index = module.layer_idx
        assert isinstance(index, int)
        cache = options.get(self._argument)
        layer = _at(getattr(cache, "layers", ()), index)
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            self._found.attending.add(index)
        state = _state(layer, _at(getattr(cache, "linear_cache", ()), index))
        if state.num_bytes and index not in self._found.stateful:
            is_tuple = isinstance(output, tuple)
            found = StatefulLayer(module, self._name, self._argument, state, is_tuple)
            self._found.stateful[index] = found


def _at(items: Sequence[Any], index: int) -> Any:
    return items[index] if -len(items) <= index < len(items) else None


def _state(layer: object, linear: object) -> LayerState:
    """What a cache has of a layer: in the interface of transformers, or as MiniMax keeps it."""
    if isinstance(linear, Tensor):
        return LayerState({}, _shapes({0: linear}))
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return LayerState(_shapes(layer.conv_states), _shapes(layer.recurrent_states))
    return LayerState({}, {})


def _shapes(tensors: dict[int, Tensor | None]) -> dict[int, StateShape]:
    return {
        number: StateShape(tuple(tensor.shape[1:]), tensor.dtype)
        for number, tensor in tensors.items()
        if tensor is not None
    }
