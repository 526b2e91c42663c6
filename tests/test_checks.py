"""Format, lint, types, imports, dependencies: what `make check` runs, a test for each line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile that live in the environment."""
    lines = iter((REPOSITORY / "Makefile").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{target}:"))
    commands = []
    for line in lines:
        if not line.startswith("\t"):
            break
        commands.append(line.removeprefix("\t$(BIN)/"))
    return commands


@pytest.mark.parametrize("command", recipe("check"))
def test_the_checkout_passes(command: str) -> None:
    program, *arguments = command.split()
    ended = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
