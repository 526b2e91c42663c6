"""Private directories, whether their processes end well or are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from service.bundled import PACKAGE
from service.launch.private_directory import make, private_directory


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_directory_is_private_and_removed(temporary: Path) -> None:
    with private_directory() as path:
        (path / "file").touch()
        assert path.parent == temporary
        assert path.stat().st_mode & 0o777 == 0o700
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("execs", [False, True], ids=["process", "program it became"])
def test_directory_of_a_killed_process_is_removed_by_the_next(temporary: Path, execs: bool) -> None:
    code = (
        "import os, sys\nfrom service.launch.private_directory import make\n"
        "directory = make()\nos.set_inheritable(directory.lock, True)\n"
        "print(directory.path, flush=True)\n"
    )
    code += "os.execv('/bin/cat', ['cat'])" if execs else "sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "TMPDIR": str(temporary)},
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        with private_directory() as mine:
            assert {*temporary.iterdir()} == {path, mine}  # it lives
        process.send_signal(signal.SIGKILL)
    with private_directory() as mine:
        assert [*temporary.iterdir()] == [mine]


def test_what_others_made_is_left_alone(temporary: Path) -> None:
    for name in ("tokenwire-notes", "tokenwire-file", "other"):
        (temporary / name).mkdir()
    (temporary / "tokenwire-file" / "data").touch()
    (temporary / "other" / "lock").touch()
    directory = make()
    os.close(directory.lock)
    assert len(list(temporary.iterdir())) == 4
    assert (temporary / "other" / "lock").exists()
