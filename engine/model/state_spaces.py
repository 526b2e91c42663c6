"""The scans of state spaces by the CPU kernels, with the signatures that models' own code calls.

transformers, whose names the arguments have, computes several tokens in chunks and single ones by
another function. The kernel goes from token to token in both, so that a state depends on its text
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu import Activation, CpuKernels


def scan(
    kernels: CpuKernels,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    return_final_states: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `mamba2_chunk_scan` of transformers: tokens [B, T, H, P], and a decay for each head."""
    if initial_states is None:
        state = hidden_states.new_zeros(len(dt), *hidden_states.shape[2:], B.shape[-1])
    else:
        state = initial_states.clone(memory_format=torch.contiguous_format)
    times = _times(kernels, dt, dt_bias, dt_softplus, dt_limit)
    output = _heads(kernels, hidden_states, times, A, (B, C), state)
    if D is not None:
        output = output + hidden_states * D.unsqueeze(-1)
    return (output, state) if return_final_states else output


def update(
    kernels: CpuKernels,
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    dt_limit: tuple[float, float] | None = None,
    **_: Any,
) -> Tensor:
    """As `mamba2_selective_state_update` of transformers: of a token, whose state it changes.

    What a head has once is repeated there for each of its numbers. The limit of the times, which
    holds there for several tokens only, holds here for single ones as well.
    """
    times = _times(
        kernels, dt[..., 0], None if dt_bias is None else dt_bias[:, 0], dt_softplus, dt_limit
    )
    given = (B.unsqueeze(1), C.unsqueeze(1))
    token = hidden_states.unsqueeze(1)
    output = _heads(kernels, token, times.unsqueeze(1), A[:, 0, 0], given, state)[:, 0]
    if D is not None:
        output = output + hidden_states * D
    return _gated(kernels, output, z)


def scan_of_channels(
    kernels: CpuKernels,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `mamba_selective_scan` of transformers: of tokens [B, D, T], with decays for each channel.

    It begins with an empty state.
    """
    hidden_states, dt, B, C = (x.transpose(1, 2) for x in (hidden_states, dt, B, C))
    times = _times(kernels, dt, delta_bias, delta_softplus)
    state = hidden_states.new_zeros(len(dt), *A.shape)
    output = _channels(kernels, hidden_states, times, A, (B, C), state)
    if D is not None:
        output = output + hidden_states * D
    output = _gated(kernels, output, None if z is None else z.transpose(1, 2)).transpose(1, 2)
    return (output, state) if return_last_state else output


def update_of_channels(
    kernels: CpuKernels,
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """As `mamba_selective_state_update` of transformers: of a token, whose state it changes."""
    times = _times(kernels, dt, dt_bias, dt_softplus).unsqueeze(1)
    given = (B.unsqueeze(1), C.unsqueeze(1))
    output = _channels(kernels, hidden_states.unsqueeze(1), times, A, given, state)[:, 0]
    if D is not None:
        output = output + hidden_states * D
    return _gated(kernels, output, z)


def _heads(
    kernels: CpuKernels,
    hidden_states: Tensor,
    times: Tensor,
    rates: Tensor,
    given: tuple[Tensor, Tensor],
    state: Tensor,
) -> Tensor:
    """What a state [B, H, P, N] gives for tokens [B, T, H, P] of times [B, T, H]; it changes."""
    value = hidden_states * times.unsqueeze(-1)
    return kernels.selective_scan(value, (times * rates).exp(), None, given, state)


def _channels(
    kernels: CpuKernels,
    hidden_states: Tensor,
    times: Tensor,
    rates: Tensor,
    given: tuple[Tensor, Tensor],
    state: Tensor,
) -> Tensor:
    """As `_heads`: a state [B, D, N], tokens [B, T, D], and input and output [B, T, N] each."""
    value = (hidden_states * times).unsqueeze(2)  # all channels are one head
    shared = (given[0].unsqueeze(2), given[1].unsqueeze(2))
    rates = rates.unsqueeze(0)
    found = kernels.selective_scan(value, times.unsqueeze(2), rates, shared, state.unsqueeze(1))
    return found[:, :, 0]


def _times(
    kernels: CpuKernels,
    dt: Tensor,
    bias: Tensor | None,
    is_softplus: bool,
    limit: tuple[float, float] | None = None,
) -> Tensor:
    times = dt if bias is None else dt + bias
    if is_softplus:
        times = kernels.activate(times, Activation.SOFTPLUS)
    return times if limit is None else times.clamp(*limit)


def _gated(kernels: CpuKernels, output: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return output
    return output * kernels.activate(gate, Activation.SILU)
