"""Peers in environments of their own, what a worker says, and the plot of what was measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.contenders import CTRANSLATE2, CTRANSLATE2_INT8, LLAMA, Contenders
from benchmarks.llama_build import PeerAbsentError
from benchmarks.load import Item
from benchmarks.peer_plots import panels
from benchmarks.peer_process import Package, peer_process
from benchmarks.simulation.plots import svg

ITEMS = [Item([1, 2, 3], 2), Item([4], 1)]
WORKER = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    streams = [[len(prompt) / 10] * tokens for prompt, tokens in json.loads(line)]
    print(json.dumps({"seconds": 1.5, "arrivals": streams}), flush=True)
"""


def test_what_cannot_be_installed_is_an_absent_peer() -> None:
    with pytest.raises(PeerAbsentError, match="peer, status 1: no such version"):
        Package("peer", "1.0").run(sys.executable, "-c", "raise SystemExit('no such version')")
    with pytest.raises(PeerAbsentError, match=r"peer: .*no-such-program"):
        Package("peer", "1.0").run("no-such-program")


def test_an_environment_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def run(package: Package, *command: str) -> None:
        (tmp_path / "tokenwire" / "peers" / "peer-2.0").mkdir(parents=True, exist_ok=True)
        ran.append(" ".join(command[1:]))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Package, "run", run)
    package = Package("peer", "2.0", ("beside==1",), ("unwanted",))
    home = package.home()
    assert package.home() == home
    assert ran == [
        f"-m venv {home}",
        "-m pip install -q peer==2.0 beside==1",
        "-m pip uninstall -q -y unwanted",
    ]


def test_a_worker_answers_loads_and_its_end_is_told() -> None:
    with peer_process("peer", [sys.executable, "-c", WORKER], os.environ) as peer:
        run = peer.run(ITEMS)
        assert run.seconds == 1.5
        assert run.arrivals == [[0.3, 0.3], [0.1]]
        assert run.first == 0.1
    once = WORKER.replace("for line in sys.stdin", "for line in []")
    with (
        peer_process("peer", [sys.executable, "-c", once], os.environ) as peer,
        pytest.raises(PeerAbsentError, match="peer ended with status 0"),
    ):
        peer.run(ITEMS)


def test_a_worker_that_does_not_start_is_told() -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with (
        pytest.raises(PeerAbsentError, match="peer ended with status 3"),
        peer_process("peer", command, os.environ),
    ):
        pass


def test_the_better_figures_of_several_runs_are_drawn() -> None:
    runs = [
        {
            "tokens_per_second": {"ours": {"1": rate, "8": 90.0}},
            "ms_between_tokens": {"ours": {"1": [p50, 30.0]}},
        }
        for rate, p50 in ((40.0, 25.0), (50.0, 20.0))
    ]
    rates, median, tail = panels(runs)
    assert rates.lines == {"ours": [(1.0, 50.0), (8.0, 90.0)]}
    assert median.lines == {"ours": [(1.0, 20.0)]}
    assert tail.lines == {"ours": [(1.0, 30.0)]}
    assert "tokens per second" in svg([rates, median, tail])


def test_what_is_left_out_is_absent_and_nothing_else() -> None:
    found = Contenders()
    for name in (LLAMA, CTRANSLATE2, CTRANSLATE2_INT8):
        with found.may_lack(name, ["server", "int8"]) as wanted:
            assert wanted == (name != CTRANSLATE2_INT8)
    with found.may_lack(LLAMA, []):
        raise PeerAbsentError("no compiler")
    assert found.absent == {CTRANSLATE2_INT8: "switched off", LLAMA: "no compiler"}
