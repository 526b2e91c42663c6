"""Another process for the length of a block, from when on it says that it is ready."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.paths import REPOSITORY


@contextmanager
def ready_process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Runs Python code that prints "ready"; kills its process afterwards, whatever it does."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "."},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
