"""What fish offers for a command line, asked of the shell itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def needs(shell: str) -> str:
    """The shell's program; skips a test where there is none."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell}")
    return program


def offered_by_fish(script: Path, line: str) -> list[str]:
    """What fish offers for the last word of a line."""
    code = f"source {script}; complete --do-complete '{line}'"
    done = subprocess.run(
        [needs("fish"), "--no-config", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=script.parent,
        env={**os.environ, "HOME": str(script.parent)},
    )
    assert done.stderr == ""
    return [offer.partition("\t")[0] for offer in done.stdout.splitlines()]
