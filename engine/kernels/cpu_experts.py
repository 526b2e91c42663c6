"""The rows of tokens that experts compute, sorted and put together by C kernels."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .addresses import flat
from .cpu_library import CpuLibrary
from .kernel import INT, POINTER, SIZE


class ExpertRows(NamedTuple):
    """Rows of tokens, one for each of their experts, sorted by expert.

    `ends` is int64 [num_experts], the ends of the experts' rows; `tokens` int64 [num_rows], whose
    each row is; `places` int64 [num_tokens, top_k], where a token's rows are.
    """

    ends: Tensor
    tokens: Tensor
    places: Tensor


class ExpertKernels(CpuLibrary):
    """Rows by their experts."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._sort_by_expert = self._kernel(
            "sort_by_expert", POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER
        )
        self._weigh_rows = self._kernel(
            "weigh_rows", POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, INT
        )
        self._take_rows = self._kernel(
            "take_rows", POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, SIZE, INT
        )

    def sort_by_expert(self, index: Tensor, num_experts: int) -> ExpertRows:
        """Return the rows of tokens, sorted by the experts int64 [num_tokens, top_k] of each.

        Raises:
            IndexError: there is no such expert.
        """
        num_tokens, top_k = index.shape
        rows = ExpertRows(
            index.new_empty(num_experts),
            index.new_empty(num_tokens * top_k),
            index.new_empty(index.shape),
        )
        self._sort_by_expert(
            flat(index, torch.int64),
            num_tokens,
            top_k,
            num_experts,
            *(part.data_ptr() for part in rows),
        )
        return rows

    def weigh_rows(self, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Return for each token the sum of rows of x, times their weights: [num_tokens, width].

        A row of the result does not depend on the other tokens, bit for bit.

        Args:
            x: fp32 [num_tokens * top_k, width].
            places: int64 [num_tokens, top_k], as `ExpertRows` has them.
            weights: fp32 of the same shape.
        """
        if places.shape != weights.shape or len(x) != places.numel():
            raise ValueError("expected a row, a place and a weight for each choice of a token")
        (num_tokens, top_k), width = places.shape, x.shape[1]
        output = self._empty_rows(x.new_empty(num_tokens, 0), width)
        self._weigh_rows(
            flat(x, torch.float32),
            flat(places, torch.int64),
            flat(weights, torch.float32),
            output.data_ptr(),
            num_tokens,
            top_k,
            width,
            torch.get_num_threads(),
        )
        return output

    def take_rows(self, x: Tensor, index: Tensor, output: Tensor | None = None) -> Tensor:
        """Return rows of x [N, width], with the indices int64 [n], in output [n, width] if given.

        Raises:
            IndexError: an index is out of range.
        """
        if output is None:
            output = self._empty_rows(x.new_empty(len(index), 0), x.shape[1])
        if x.dtype != torch.float32 or x.stride(1) != 1 or output.shape != (len(index), x.shape[1]):
            raise ValueError("expected fp32 rows, and room for as many as there are indices")
        self._take_rows(
            x.data_ptr(),
            x.stride(0),
            len(x),
            flat(index, torch.int64),
            flat(output, torch.float32),
            len(index),
            x.shape[1],
            torch.get_num_threads(),
        )
        return output
