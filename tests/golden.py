"""Golden files: bytes that a change must not touch by accident.

`UPDATE_GOLDEN=1 pytest <file>` writes them anew; the difference is then read like code.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def check_golden(path: Path, actual: bytes) -> None:
    """Compares with a file, or writes it when UPDATE_GOLDEN is set."""
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_bytes(actual)
    assert actual.splitlines() == path.read_bytes().splitlines()  # pytest shows this line by line
    assert actual == path.read_bytes()


def check_no_others(folder: Path, names: Iterable[str]) -> None:
    """A file whose case is gone proves nothing."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
