"""What the lock files say."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.utils import canonicalize_name

PINNED = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)")


def pins(lock: Path) -> dict[str, str]:
    """Versions by normalised name."""
    matches = (PINNED.match(line) for line in lock.read_text().splitlines())
    return {canonicalize_name(match[1]): match[2] for match in matches if match}
