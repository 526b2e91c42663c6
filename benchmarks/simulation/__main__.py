"""Runs the studies: tables, one JSON line, and plots if they are asked for."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.report import table
from benchmarks.simulation.costs import measured
from benchmarks.simulation.studies import STUDIES, TINY, Lab, Panel, Scale


def as_table(panel: Panel) -> str:
    """A row for each x, a column for each line."""
    xs = sorted({x for line in panel.lines.values() for x, _ in line})
    values = [dict(line) for line in panel.lines.values()]
    rows = [[f"{x:g}", *(f"{line[x]:.4g}" if x in line else "" for line in values)] for x in xs]
    title = f"{panel.title}: {panel.y_label}"
    return f"{title}\n{table([panel.x_label, *panel.lines], rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="a folder for SVGs; needs matplotlib")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=[*STUDIES])
    parser.add_argument("--tiny", action="store_true", help="a try-out that takes seconds")
    given = parser.parse_args()
    lab = Lab(measured(), TINY if given.tiny else Scale())
    found = {name: STUDIES[name](lab) for name in given.only}
    for name, panels in found.items():
        print(name, *map(as_table, panels), sep="\n")
        if given.plot is not None:
            _write(panels, given.plot / f"{name}.svg")
    print(json.dumps({name: [asdict(panel) for panel in panels] for name, panels in found.items()}))


def _write(panels: list[Panel], path: Path) -> None:
    from benchmarks.simulation.plots import svg  # here, because tables need no matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(panels))


if __name__ == "__main__":
    main()
