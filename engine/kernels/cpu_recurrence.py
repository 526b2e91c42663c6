"""Layers with a state by C kernels: delta rules, state spaces, and convolutions over time."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .addresses import flat
from .cpu_library import CpuLibrary
from .kernel import INT, POINTER, SIZE


class RecurrenceKernels(CpuLibrary):
    """What such layers compute token by token."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._gated_delta_rule = self._kernel("gated_delta_rule", *[POINTER] * 7, *[SIZE] * 7, INT)
        self._selective_scan = self._kernel("selective_scan", *[POINTER] * 7, *[SIZE] * 6, INT)
        self._causal_conv = self._kernel(
            "causal_conv", POINTER, SIZE, *[POINTER] * 3, *[SIZE] * 4, INT, INT
        )

    def gated_delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor | None,
        state: Tensor,
    ) -> Tensor:
        """Return what a state gives for each token [B, T, H, V], and change it: token by token.

        A token's result does not depend on how a text is divided among calls, bit for bit.

        Args:
            query: fp32 [B, T, G, K], for H / G heads each; K is a multiple of 4.
            key: of the same shape.
            value: fp32 [B, T, H, V].
            decay: fp32 [B, T, H], 0 … 1, by which a token multiplies the state; or [B, T, H, K].
            beta: fp32 [B, T, H], how much of what the state lacks a token adds. None if it adds its
                value, whatever the state has: linear attention, with one decay a head.
            state: fp32 [B, H, K, V].
        """
        (batch, tokens, groups, key_size), (heads, value_size) = key.shape, value.shape[2:]
        fits = query.shape == key.shape and value.shape[:2] == key.shape[:2]
        fits &= decay.shape[:3] == value.shape[:3] and heads % groups == 0
        decay_size = key_size if decay.dim() == 4 and beta is not None else 1
        fits &= decay.numel() == batch * tokens * heads * decay_size
        fits &= beta is None or beta.shape == value.shape[:3]
        if not fits or key_size % 4 or state.shape != (batch, heads, key_size, value_size):
            raise ValueError("query, key, value, decay, beta and state do not fit together")
        inputs = [x.contiguous() for x in (query, key, value, decay)]
        beta = None if beta is None else beta.contiguous()
        output = torch.empty_like(inputs[2])
        self._gated_delta_rule(
            *(flat(x, torch.float32) for x in inputs),
            None if beta is None else flat(beta, torch.float32),
            flat(state, torch.float32),
            output.data_ptr(),
            batch,
            tokens,
            groups,
            heads,
            key_size,
            value_size,
            decay_size,
            torch.get_num_threads(),
        )
        return output

    def selective_scan(
        self,
        value: Tensor,
        step: Tensor,
        rates: Tensor | None,
        given: tuple[Tensor, Tensor],
        state: Tensor,
    ) -> Tensor:
        """Return what a state space gives for each token [B, T, H, P], and change its state.

        The state is multiplied by a decay, and each value times the token's input is added. What it
        gives are its products with the token's output. As with `gated_delta_rule`, divisions change
        no bit.

        Args:
            value: fp32 [B, T, H, P].
            step: the decays, fp32 [B, T, H]; with rates a time for each value, [B, T, H, P].
            rates: fp32 [H, P, N], where the decays are exp(step * rates).
            given: a token's input and output, fp32 [B, T, G, N] each, for H / G heads each.
            state: fp32 [B, H, P, N].
        """
        (batch, tokens, heads, head_size), (groups, size) = value.shape, given[0].shape[2:]
        fits = all(x.shape == (batch, tokens, groups, size) for x in given) and heads % groups == 0
        fits &= step.shape == (value.shape[:3] if rates is None else value.shape)
        fits &= rates is None or rates.shape == (heads, head_size, size)
        if not fits or state.shape != (batch, heads, head_size, size):
            raise ValueError("value, step, rates, input, output and state do not fit together")
        value, step, *inputs = (x.contiguous() for x in (value, step, *given))
        output = torch.empty_like(value)
        self._selective_scan(
            flat(value, torch.float32),
            flat(step, torch.float32),
            None if rates is None else flat(rates, torch.float32),
            *(flat(x, torch.float32) for x in inputs),
            flat(state, torch.float32),
            output.data_ptr(),
            batch,
            tokens,
            groups,
            heads,
            head_size,
            size,
            torch.get_num_threads(),
        )
        return output

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False
    ) -> Tensor:
        """Return sums over windows of x in each channel, or their SiLU: [B, C, T].

        Args:
            x: fp32 [B, C, T + taps - 1].
            weight: fp32 [C, taps].
            bias: fp32 [C].
            silu: whether the SiLU is asked for.
        """
        (channels, taps), (batch, _, width) = weight.shape, x.shape
        if x.shape[1] != channels or width < taps - 1:
            raise ValueError("x and weight do not fit together")
        x, weight = x.contiguous(), weight.contiguous()
        output = x.new_empty(batch, channels, width - taps + 1)
        self._causal_conv(
            flat(x, torch.float32),
            width,
            flat(weight, torch.float32),
            None if bias is None else flat(bias, torch.float32),
            output.data_ptr(),
            batch * channels,
            channels,
            output.shape[2],
            taps,
            silu,
            torch.get_num_threads(),
        )
        return output
