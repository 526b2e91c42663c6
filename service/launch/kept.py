"""Where a service process keeps what the next one in its place may need.

In the supervisor's private directory: it is there as long as the server runs, whoever dies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "TOKENWIRE_KEPT"  # which the supervisor sets: it is nobody's setting


def kept_file(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file of a name; None for a process without a supervisor."""
    directory = environment.get(VARIABLE, "")
    return Path(directory) / name if directory else None
