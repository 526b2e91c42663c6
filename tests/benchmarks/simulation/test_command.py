"""The command answers all questions, and draws the same bytes every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.simulation.__main__ import main
from benchmarks.simulation.studies import STUDIES, Panel


def test_every_study_has_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulation", "--tiny"])
    main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*found] == [*STUDIES]
    for panel in (panel for panels in found.values() for panel in panels):
        assert panel["lines"]
        assert all(panel["lines"].values())


def test_plots_are_small_and_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        monkeypatch.setattr(
            sys, "argv", ["x", "--tiny", "--only", "queues", "--plot", str(tmp_path / name)]
        )
        main()
    one, two = ((tmp_path / name / "queues.svg").read_text() for name in ("one", "two"))
    assert one == two
    assert "--max-concurrent-requests" in one
    assert len(one) < 80_000


def test_a_plot_has_every_line_of_its_panels() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.simulation.plots import svg

    panel = Panel(
        title="a title",
        x_label="x",
        y_label="y",
        lines={"first": [(1, 2), (3, 4)], "second": [(1, 5)]},
    )
    text = svg([panel])
    assert all(word in text for word in ("a title", "first", "second"))
