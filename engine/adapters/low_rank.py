"""A linear layer with the updates of all adapters beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class AdaptedRows:
    """The rows of a step that have an adapter.

    Attributes:
        num_tokens: of the step.
        rows: int64 [num_rows], which of them; None for all.
        owners: int64 [num_rows], the number of each one's adapter.
        others: see `columns_of_others`.
    """

    num_tokens: int
    rows: Tensor | None
    owners: Tensor
    others: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def columns_of_others(self, ranks: tuple[int, ...]) -> Tensor:
        """Bool [num_rows, sum(ranks)]: the columns of adapters that are not the row's own.

        Most layers have the same ranks, so it is computed once in a step.
        """
        mask = self.others.get(ranks)
        if mask is None:
            numbers = torch.arange(len(ranks), device=self.owners.device)
            columns = numbers.repeat_interleave(
                torch.tensor(ranks, device=self.owners.device), output_size=sum(ranks)
            )
            mask = columns.unsqueeze(0) != self.owners.unsqueeze(1)
            self.others[ranks] = mask
        return mask


class Step:
    """The rows with adapters of the step that is being computed: one for a whole model."""

    def __init__(self) -> None:
        self.adapted: AdaptedRows | None = None


class AdaptedLinear(nn.Module):
    """A layer of any kind, y = layer(x), and for rows with adapter i also up_i(down_i(x)).

    The matrices of all adapters lie side by side, [sum of ranks, in] and [out, sum of ranks], so
    that rows of any adapters are computed by the same two products. Between these, the columns of
    other adapters are set to 0.
    """

    def __init__(
        self,
        layer: nn.Module,
        down: nn.Module,
        up: nn.Module,
        ranks: Sequence[int],
        step: Step,
    ) -> None:
        """Take over a layer and the two products; `ranks` has each adapter's columns."""
        super().__init__()
        self.layer = layer
        self.down = down
        self.up = up
        self.ranks = tuple(ranks)
        self.num_calls = 0  # with adapted rows: tells whether the model calls the layer at all
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's result for x [..., in], with the updates of the rows' adapters.

        Raises:
            RuntimeError: the rows of x are not the step's tokens.
        """
        result = self.layer(x)
        assert isinstance(result, Tensor)
        adapted = self._step.adapted
        return result if adapted is None else self._updated(x, result, adapted)

    def _updated(self, x: Tensor, result: Tensor, adapted: AdaptedRows) -> Tensor:
        self.num_calls += 1
        inputs = x.reshape(-1, x.shape[-1])
        if len(inputs) != adapted.num_tokens:
            raise RuntimeError(f"a layer got {len(inputs)} rows of {adapted.num_tokens} tokens")
        if adapted.rows is not None:
            inputs = inputs.index_select(0, adapted.rows)
        inner = self.down(inputs).masked_fill_(adapted.columns_of_others(self.ranks), 0.0)
        delta: Tensor = self.up(inner)
        if adapted.rows is None:
            return result + delta.view_as(result)
        rows = result.reshape(-1, result.shape[-1]).index_add(0, adapted.rows, delta)
        return rows.view_as(result)
