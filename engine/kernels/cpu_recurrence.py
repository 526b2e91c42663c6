"""Layers with a state by C kernels: the delta rule, and convolutions over time."""

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
        self._gated_delta_rule = self._kernel("gated_delta_rule", *[POINTER] * 7, *[SIZE] * 6, INT)
        self._causal_conv = self._kernel(
            "causal_conv", POINTER, SIZE, *[POINTER] * 3, *[SIZE] * 4, INT, INT
        )

    def gated_delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        state: Tensor,
    ) -> Tensor:
        """Return what a state gives for each token [B, T, H, V], and change it: token by token.

        A token's result does not depend on how a text is divided among calls, bit for bit.

        Args:
            query: fp32 [B, T, G, K], for H / G heads each; K is a multiple of 4.
            key: of the same shape.
            value: fp32 [B, T, H, V].
            decay: fp32 [B, T, H], 0 … 1, by which a token multiplies the state.
            beta: fp32 [B, T, H], how much of what the state lacks a token adds.
            state: fp32 [B, H, K, V].
        """
        (batch, tokens, groups, key_size), (heads, value_size) = key.shape, value.shape[2:]
        fits = query.shape == key.shape and value.shape[:2] == key.shape[:2]
        fits &= decay.shape == beta.shape == value.shape[:3] and heads % groups == 0
        if not fits or key_size % 4 or state.shape != (batch, heads, key_size, value_size):
            raise ValueError("query, key, value, decay, beta and state do not fit together")
        inputs = [x.contiguous() for x in (query, key, value, decay, beta)]
        output = torch.empty_like(inputs[2])
        self._gated_delta_rule(
            *(flat(x, torch.float32) for x in inputs),
            flat(state, torch.float32),
            output.data_ptr(),
            batch,
            tokens,
            groups,
            heads,
            key_size,
            value_size,
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
