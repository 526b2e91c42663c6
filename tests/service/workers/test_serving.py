"""A process that does work for another one, whose end it may meet at any time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engine.protocol.wire import framed
from tests.paths import REPOSITORY


def test_a_process_whose_parent_has_ended_says_nothing(tmp_path: Path) -> None:
    """As where a server is stopped soon after its start: no traceback in its log."""
    command = [sys.executable, "-m", "tests.service.text.unruly_worker", str(1 << 40)]
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
