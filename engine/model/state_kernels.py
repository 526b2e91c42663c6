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
from torch import Tensor
from transformers.activations import ACT2FN

from ..kernels.cpu import CpuKernels
from ..recurrent.layer_state import LayerState
from ..recurrent.recurrence import Recurrence

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
    """As `torch_chunk_gated_delta_rule` of transformers, and as the recurrent one."""
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


_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv,
    "causal_conv1d_update": causal_conv_update,
}
_DELTA_RULE: dict[str, Callable[..., Any]] = {
    **_CONVOLUTIONS,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "torch_recurrent_gated_delta_rule": gated_delta_rule,
}


def compute_by(recurrence: Recurrence, kernels: CpuKernels) -> int:
    """Has kernels compute layers whose code calls these functions; returns how many there are."""
    return recurrence.change(partial(_calling, kernels))


def _calling(
    kernels: CpuKernels, forward: Callable[..., Any], state: LayerState
) -> Callable[..., Any] | None:
    """A layer's forward that calls kernels in place of transformers' functions.

    None if it does not call all that its state takes, since single ones would not make its results
    exact, or if the kernels do not take its heads.
    """
    functions = _DELTA_RULE if state.recurrent else _CONVOLUTIONS
    method = inspect.unwrap(forward)
    code = getattr(method, "__code__", None)
    sizes = [shape.size for shape in state.recurrent.values()]
    if not isinstance(forward, MethodType) or code is None:
        return None
    if not functions.keys() <= {*code.co_names}:
        return None
    if any(size[-2] % 4 for size in sizes):  # of keys
        return None
    ours = {name: partial(function, kernels) for name, function in functions.items()}
    changed = FunctionType(
        code, {**method.__globals__, **ours}, code.co_name, method.__defaults__, method.__closure__
    )
    changed.__kwdefaults__ = method.__kwdefaults__
    return MethodType(changed, forward.__self__)
