"""Ranks as tests of several files need them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.replay.cpu_recorder import CpuGraph
from tests.engine.native import threads
from tests.engine.shards.team import Team, team


@pytest.fixture(scope="module")
def pair(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Two ranks, each with one thread."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with threads(1), team(pytestconfig, meeting, 2) as found:
        yield found


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[CpuGraph]:
    """The recorded steps that this process replays, in their order."""
    graphs: list[CpuGraph] = []
    replay = CpuGraph.replay
    monkeypatch.setattr(CpuGraph, "replay", lambda graph: graphs.append(graph) or replay(graph))
    return graphs
