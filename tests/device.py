"""The device that tests of kernels and engines run on: `pytest --device cuda` or `--device cpu`.

Without the option it is a GPU where there is one. Triton reads whether to interpret its kernels as
soon as it is imported, and transformers imports it: so this is decided before anything else is
imported, from the command line itself.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

_DRIVER_FILE = Path("/dev/nvidiactl")
CHOICES = ("cpu", "cuda")


def device_type(words: list[str] | None = None) -> str:
    """What the command line of pytest asks for, or else what the machine has.

    Args:
        words: of that command line; None for this process's own, and pytest's variable.
    """
    if words is None:
        words = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *sys.argv[1:]]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=CHOICES)
    found = parser.parse_known_args([word for word in words if word != "--"])[0].device
    return str(found or ("cuda" if _DRIVER_FILE.exists() else "cpu"))


def interpret_triton(device: str) -> None:
    """Switches Triton's interpreter on for a CPU, and off for a GPU."""
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
