"""From scores to tokens by C kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cpu_library import CpuLibrary
from .kernel import INT, POINTER, SIZE


class SamplingKernels(CpuLibrary):
    """Scores truncated, and tokens chosen."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._choose = self._kernel("choose", POINTER, SIZE, SIZE, SIZE, *[POINTER] * 5, INT)
        self._truncate = self._kernel("truncate", POINTER, SIZE, SIZE, SIZE, *[POINTER] * 4, INT)

    def choose(
        self, scores: Tensor, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a token for every row of scores, which are read once from memory.

        A row's result depends on that row alone. NaN and infinities are treated as in torch: the
        maximum of a row with a NaN is NaN, and its token is the first NaN; if the maximum is NaN or
        infinite, the norm is NaN and the draw is ignored.

        Args:
            scores: fp32 [rows, V] with contiguous rows, V at least 1.
            draws: fp64 [rows] in [0, 1): the chosen token is the first at which the cumulative
                probability exceeds the draw. Below 0, and without draws, it is the likeliest token,
                the first of equal ones.

        Returns:
            int64 [rows], the tokens; fp32 [rows], their log-probabilities; fp32 [rows], the maxima;
            fp32 [rows], the norms: the logarithm of the sum of exp(score - maximum).
        """
        rows, width = scores.shape
        _check_scores(scores)
        if draws is not None and (draws.shape != (rows,) or draws.dtype != torch.float64):
            raise ValueError("expected an fp64 draw for each row")
        draws = None if draws is None else draws.contiguous()  # held until the kernel has read it
        logprobs, maxima, norms = (scores.new_empty(rows) for _ in range(3))
        ids = torch.empty(rows, dtype=torch.int64)
        self._choose(
            scores.data_ptr(),
            scores.stride(0),
            rows,
            width,
            None if draws is None else draws.data_ptr(),
            ids.data_ptr(),
            logprobs.data_ptr(),
            maxima.data_ptr(),
            norms.data_ptr(),
            torch.get_num_threads(),
        )
        return ids, logprobs, maxima, norms

    def truncate(self, scores: Tensor, limits: Tensor) -> None:
        """Divide rows by their temperatures and set the scores of dropped tokens to -inf, in place.

        Rows with a NaN or without a finite maximum are only divided.

        Args:
            scores: fp32 [rows, V] with contiguous rows, V at least 1.
            limits: fp32 [4, rows]: temperature, top-k, top-p and typical-p. Top-k keeps the k
                largest scores and those that equal the last of them; V or more keeps all. Top-p
                keeps the fewest of the largest scores whose probabilities sum to its share, the
                first of equal ones; 1 or more keeps all. Typical-p does the same with the scores
                nearest to the mean score.
        """
        rows, width = scores.shape
        _check_scores(scores)
        if limits.shape != (4, rows) or limits.dtype != torch.float32:
            raise ValueError("expected four fp32 limits for each row")
        limits = limits.contiguous()
        self._truncate(
            scores.data_ptr(),
            scores.stride(0),
            rows,
            width,
            *(limit.data_ptr() for limit in limits),
            torch.get_num_threads(),
        )


def _check_scores(scores: Tensor) -> None:
    if scores.dtype != torch.float32 or scores.stride(1) != 1 or not scores.shape[1]:
        raise ValueError("expected fp32 scores with contiguous rows")
