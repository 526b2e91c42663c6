"""A process that does work for another one, whose end it may meet at any time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.protocol.wire import framed
from tests.paths import REPOSITORY


def test_a_process_whose_parent_has_ended_says_nothing(tmp_path: Path) -> None:
    """As where a server is stopped soon after its start: no traceback in its log."""
    command = [sys.executable, "-m", "tests.service.text.unruly_worker", str(1 << 40)]
    command.append(str(os.getpid()))
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate(framed([str(tmp_path / "starts")]), timeout=60)
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize("module", ["service.grammar.worker", "tests.service.text.unruly_worker"])
def test_a_process_whose_parent_ended_before_it_was_bound_to_it_ends_at_once(module: str) -> None:
    """It would do its work for nobody, and then say that nobody is there."""
    another = str(os.getppid())
    result = subprocess.run(
        [sys.executable, "-m", module, str(1 << 40), another],
        cwd=REPOSITORY,
        input=framed(["a setup", "that is not", "looked at", ""]),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"")
