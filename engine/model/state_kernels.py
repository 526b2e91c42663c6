"""The operations of layers with a state, by the CPU kernels, for the models' own code to call.

transformers' functions have one way to compute several tokens, in chunks, and another one for
single tokens, and torch's convolutions differ likewise: so a state depends on how its text was
divided among steps. The kernels go from token to token. A layer's forward stays transformers' code,
in which the names of these functions mean ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..kernels.cpu import CpuKernels
from ..recurrent.layer_state import LayerState
from ..recurrent.recurrence import Recurrence
from . import lightning_attention, state_spaces
from .routers import multiplying

_EPSILON = 1e-6  # of transformers' norms of query and key


def gated_delta_rule(
    kernels: CpuKernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `torch_chunk_gated_delta_rule` of transformers, and as the recurrent one.

    And as those of Kimi, whose logarithms of decays g have a size [B, T, H, K], not [B, T, H].
    """
    if use_qk_l2norm_in_kernel:
        query, key = _normed(query), _normed(key)
    if initial_state is None:
        state = value.new_zeros(len(value), value.shape[2], key.shape[3], value.shape[3])
    else:
        state = initial_state.clone(memory_format=torch.contiguous_format)
    query = query * query.shape[-1] ** -0.5
    output = kernels.gated_delta_rule(query, key, value, g.exp(), beta, state)
    return output, state if output_final_state else None


def _normed(x: Tensor) -> Tensor:
    x = x.contiguous()  # torch adds up numbers that are apart in another order
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + _EPSILON)


def causal_conv(
    kernels: CpuKernels,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """As `causal_conv1d_fn` of transformers: of a text without anything before it."""
    x = F.pad(hidden_states, (weight.shape[-1] - 1, 0))
    return _convolved(kernels, x, weight, bias, activation)


def causal_conv_update(
    kernels: CpuKernels,
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As `causal_conv1d_update` of transformers: of a text that goes on, whose state it changes."""
    x = torch.cat((conv_state, hidden_states), dim=-1)
    conv_state.copy_(x[..., -conv_state.shape[-1] :])
    needed = hidden_states.shape[-1] + weight.shape[-1] - 1
    return _convolved(kernels, x[..., -needed:], weight, bias, activation)


def _convolved(
    kernels: CpuKernels, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    is_silu = activation in ("silu", "swish")
    found = kernels.causal_conv(x, weight, bias, silu=is_silu)
    return found if is_silu or activation is None else ACT2FN[activation](found)


_Functions = dict[str, Callable[..., Any]]  # of ours, by transformers' names for them
_CONVOLUTIONS: _Functions = {
    "causal_conv1d_fn": causal_conv,
    "causal_conv1d_update": causal_conv_update,
}
_WITH_STATES: tuple[_Functions, ...] = (  # for several tokens, and for single ones
    {
        "torch_chunk_gated_delta_rule": gated_delta_rule,
        "torch_recurrent_gated_delta_rule": gated_delta_rule,
    },
    {
        "chunk_kimi_delta_attention": gated_delta_rule,
        "recurrent_kimi_delta_attention": gated_delta_rule,
    },
    {
        "mamba2_chunk_scan": state_spaces.scan,
        "mamba2_selective_state_update": state_spaces.update,
    },
    {
        "mamba_selective_scan": state_spaces.scan_of_channels,
        "mamba_selective_state_update": state_spaces.update_of_channels,
    },
)


def compute_by(recurrence: Recurrence, kernels: CpuKernels) -> int:
    """Has kernels compute layers whose code calls these functions; returns how many there are."""
    return recurrence.change(partial(_by_kernels, kernels))


def _by_kernels(
    kernels: CpuKernels, forward: Callable[..., Any], state: LayerState
) -> Callable[..., Any] | None:
    """A layer's forward by kernels; None if they cannot compute all that its state takes.

    Some of it would not make its results exact.
    """
    layer = getattr(forward, "__self__", None)
    if not isinstance(forward, MethodType) or not isinstance(layer, nn.Module):
        return None
    if lightning_attention.takes(layer):
        return partial(lightning_attention.forward, kernels, layer, forward)
    method = inspect.unwrap(forward)
    code = getattr(method, "__code__", None)
    functions = None if code is None else _functions(frozenset(code.co_names), state)
    return None if functions is None else _calling(kernels, layer, method, functions)


def _calling(
    kernels: CpuKernels, layer: nn.Module, method: Any, functions: _Functions
) -> Callable[..., Any]:
    """A layer's forward that calls kernels in place of transformers' functions."""
    ours = {name: partial(function, kernels) for name, function in functions.items()}
    if state_spaces.update in functions.values():  # which is not told of it
        name = "mamba2_selective_state_update"
        ours[name] = partial(ours[name], dt_limit=getattr(layer, "time_step_limit", None))
    known = {**method.__globals__, **ours}
    code, defaults, closure = method.__code__, method.__defaults__, method.__closure__
    changed = FunctionType(code, known, code.co_name, defaults, closure)
    changed.__kwdefaults__ = method.__kwdefaults__
    bound = MethodType(changed, layer)
    if state_spaces.update_of_channels in functions.values():  # it reads this layer's weight
        own: Any = layer
        return multiplying(bound, kernels, own.dt_proj.weight.detach())
    return bound


def _functions(names: frozenset[str], state: LayerState) -> _Functions | None:
    """What takes the place of functions of these names; None if not all are known."""
    if not names >= _CONVOLUTIONS.keys():
        return None
    if not state.recurrent:
        return _CONVOLUTIONS
    found = next((one for one in _WITH_STATES if names >= one.keys()), None)
    if found is None:
        return None
    sizes = [shape.size for shape in state.recurrent.values()]
    if gated_delta_rule in found.values() and any(size[-2] % 4 for size in sizes):  # of keys
        return None
    return _CONVOLUTIONS | found
