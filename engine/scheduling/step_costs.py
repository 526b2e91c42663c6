"""What a row more costs a step, learned from the steps that were run."""

from __future__ import annotations

from dataclasses import dataclass

_KEPT = 0.98  # of an observation's weight, at each later one
_LEAST_WEIGHT = 4.0  # of observations, before which nothing is known
_LEAST_SPREAD = 8.0  # of their rows, squared: steps of one size tell nothing of others
_OUTLIER = 3.0  # a step that took so many times as long as usual was disturbed


@dataclass(slots=True)
class _Line:
    """A line through seconds over rows, by least squares; older observations count less."""

    weight: float = 0.0
    mean_rows: float = 0.0
    mean_seconds: float = 0.0
    spread: float = 0.0  # weighted sum of squared distances from the mean of rows
    product: float = 0.0  # the same of distances of rows times those of seconds

    def add(self, rows: int, seconds: float) -> None:
        """Counts an observation (Welford's update of weighted means and co-moments)."""
        self.weight = _KEPT * self.weight + 1
        off_rows, off_seconds = rows - self.mean_rows, seconds - self.mean_seconds
        self.mean_rows += off_rows / self.weight
        self.mean_seconds += off_seconds / self.weight
        self.spread = _KEPT * self.spread + off_rows * (rows - self.mean_rows)
        self.product = _KEPT * self.product + off_rows * (seconds - self.mean_seconds)

    @property
    def is_known(self) -> bool:
        return self.weight >= _LEAST_WEIGHT and self.spread >= _LEAST_SPREAD

    def share(self, rows: int) -> float:
        """What one row more adds to a step of so many rows, as a share of that step."""
        slope = max(0.0, self.product / self.spread)
        return slope / max(self.mean_seconds + slope * (rows - self.mean_rows), slope)


class StepCosts:
    """Seconds of steps over their rows, apart for each size of batch.

    The relation is no line over all sizes: few rows cost a step hardly anything while it waits for
    the weights, many cost it their arithmetic. So batches of about the same number of sequences,
    within a factor of two, have a line of their own.
    """

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}

    def observe(self, num_seqs: int, num_rows: int, seconds: float) -> None:
        """Counts a step in which all sequences decode."""
        line = self._lines.setdefault(num_seqs.bit_length(), _Line())
        if line.is_known:
            seconds = min(seconds, _OUTLIER * line.mean_seconds)
        line.add(num_rows, seconds)

    def row_share(self, num_seqs: int) -> float:
        """What one row more adds to a step with one row of each sequence, as a share of that step.

        0 while it is not known, so that it is tried: also again, when steps were of one size for a
        long time.
        """
        line = self._lines.get(num_seqs.bit_length())
        return line.share(num_seqs) if line is not None and line.is_known else 0.0
