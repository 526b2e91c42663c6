"""Panels as a small SVG that is the same, byte for byte, for the same figures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .studies import Panel

_STYLE = {
    "svg.hashsalt": "tokenwire",  # ids of elements would be random
    "svg.fonttype": "none",  # texts stay texts: smaller, and the reader's font
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
}
_WIDTH_INCH, _HEIGHT_INCH = 4.6, 3.6


def svg(panels: Sequence[Panel]) -> str:
    """Draws panels side by side, each with a legend."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCH * len(panels), _HEIGHT_INCH), layout="constrained")
        FigureCanvasSVG(figure)
        for panel, axes in zip(
            panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True
        ):
            _draw(panel, axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _draw(panel: Panel, axes: matplotlib.axes.Axes) -> None:
    for name, points in panel.lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.log_x:
        axes.set_xscale("log")
        ticks = sorted({x for points in panel.lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if panel.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
