"""Draws what `peers` has measured: tokens per second and the time between tokens over streams.

    python -m benchmarks.peer_plots docs/peers.svg RESULT…

Each RESULT is a file whose last line is that of a run; where several runs have the same arm, the
better figures count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.simulation.plots import svg
from benchmarks.simulation.studies import Line, Panel


def panels(results: Iterable[dict[str, Any]]) -> list[Panel]:
    """Three: tokens per second, and the median and the 99th percentile between tokens."""
    runs = list(results)
    between = [run["ms_between_tokens"] for run in runs]
    rates = Panel(
        title="tokens per second",
        x_label="streams",
        y_label="tokens/s, prompts included",
        lines=_best([run["tokens_per_second"] for run in runs], float, max),
        log_x=True,
    )
    waits = [
        Panel(
            title=f"time between tokens, {name}",
            x_label="streams",
            y_label="ms",
            lines=_best(between, lambda pair, at=at: pair[at], min),
            log_x=True,
        )
        for at, name in enumerate(("p50", "p99"))
    ]
    return [rates, *waits]


def _best(
    tables: list[dict[str, dict[str, Any]]],
    value: Callable[[Any], float],
    better: Callable[[float, float], float],
) -> dict[str, Line]:
    """Lines by arm, of the better figures of all tables."""
    found: dict[str, dict[float, float]] = {}
    for table in tables:
        for arm, by_count in table.items():
            line = found.setdefault(arm, {})
            for count, cell in by_count.items():
                at, figure = float(count), value(cell)
                line[at] = better(line.get(at, figure), figure)
    return {arm: sorted(line.items()) for arm, line in found.items()}


def main() -> None:
    """Reads the results and writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plot", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    last_lines = (path.read_text().splitlines()[-1] for path in arguments.results)
    arguments.plot.write_text(svg(panels(map(json.loads, last_lines))))


if __name__ == "__main__":
    main()
