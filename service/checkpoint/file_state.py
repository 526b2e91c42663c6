"""Files that are not what their names say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.protocol.git_lfs import POINTER


def check_not_pointer(path: Path) -> None:
    """Refuses what Git has in place of a large file that was not fetched.

    Raises:
        ValueError: it is such a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{path} is a pointer of git-lfs and not the file itself; `git lfs pull` fetches it"
            )


def check_text(path: Path) -> None:
    """Refuses what is no text.

    Raises:
        ValueError: it is not in UTF-8, or a pointer of git-lfs.
    """
    check_not_pointer(path)
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that a file has.

    Raises:
        ValueError: it has something else.
    """
    check_not_pointer(path)
    try:
        value = json.loads(path.read_text("utf-8"))  # bytes might be in UTF-16, or have a mark
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value
