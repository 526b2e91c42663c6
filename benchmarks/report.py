"""Tables, verdicts on targets, and the last line of output as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and its goal.

    Attributes:
        name: what is measured.
        value: the figure; None if it could not be measured.
        goal: the value to reach.
        at_least: whether the goal is a minimum; otherwise it is a maximum.
        percent: whether it is printed as a percentage.
    """

    name: str
    value: float | None
    goal: float
    at_least: bool = True
    percent: bool = False

    @property
    def verdict(self) -> str:
        """`met`, `missed` or `not measured`."""
        if self.value is None:
            return "not measured"
        met = self.value >= self.goal if self.at_least else self.value <= self.goal
        return "met" if met else "missed"

    def cells(self) -> list[str]:
        """Name, value, goal and verdict."""
        sign = ">=" if self.at_least else "<="
        value = "-" if self.value is None else self._number(self.value)
        return [self.name, value, f"{sign} {self._number(self.goal)}", self.verdict]

    def _number(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else f"{value:.2f} x"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text; the first column is left-aligned, the other columns are right-aligned."""
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def targets_table(targets: Sequence[Target]) -> str:
    """One line per target."""
    return table(["target", "measured", "goal", ""], [target.cells() for target in targets])


def last_line(result: dict[str, Any], targets: Sequence[Target]) -> str:
    """The result and the targets as one line of JSON."""
    found = [{**asdict(target), "verdict": target.verdict} for target in targets]
    return json.dumps({**result, "targets": found})


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile of at least one value."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
