"""Memory of a process in a container."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from engine.protocol import host_memory
from engine.protocol.host_memory import available_memory

KINDS = "anon 700\nactive_file 30\ninactive_file 200\n"


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text(KINDS)
    return tmp_path


def test_is_what_the_limit_leaves_and_what_files_take(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("1500\n")
    assert available_memory() == 1500 - 1000 + 230


def test_is_nothing_beyond_the_limit(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("500\n")
    assert available_memory() == 0


@pytest.mark.parametrize("limit", ["max\n", f"{2**62}\n", None])
def test_is_that_of_the_machine_without_a_smaller_limit(cgroup: Path, limit: str | None) -> None:
    if limit is not None:
        (cgroup / "memory.max").write_text(limit)
    found = available_memory()
    assert found > 0
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.5)
