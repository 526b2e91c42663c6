"""`python -m tests.service.text.unruly_worker`: a process for long texts that does as it is told.

A text is the name of what becomes of it. Its setup is a file, of which each start makes a line.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.workers.serving import serve

Answer = dict[str, Any]


def start(setup: list[Any]) -> Callable[[dict[str, Any]], Answer | Iterator[bytes | Answer]]:
    """Notes the start; returns what answers."""
    (file,) = setup
    with Path(file).open("a") as starts:
        starts.write("started\n")
    return answer


def answer(request: dict[str, Any]) -> Answer | Iterator[bytes | Answer]:
    """Does what the text says."""
    if request["do"] == "list":
        return parts(request["text"])
    match request["text"]:
        case "waits":
            threading.Event().wait()
        case "works":
            while True:
                pass
        case "dies":
            os._exit(1)
        case "has no memory":
            return {"no_memory": True}
        case "counts":
            return {"count": 7}
    return {"ids": array("I", [1, 2, 3]).tobytes()}


def parts(text: str) -> Iterator[bytes | Answer]:
    """Three parts of a list, and how it ends."""
    yield from (b"a", b"bc", b"def")
    if text == "dies in the middle":
        os._exit(1)
    yield {"too_large": True} if text == "is too large" else {}


if __name__ == "__main__":
    serve(start)
