"""Golden files: bytes that must not change by accident.

`UPDATE_GOLDEN=1 pytest <file>` rewrites them; the difference is then reviewed like code.
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
    """Asserts that every file of a folder belongs to a case that exists."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
