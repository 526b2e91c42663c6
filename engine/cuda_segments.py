"""Lets the memory that torch reserves on a GPU grow in place.

By default torch's allocator takes pieces of fixed sizes from the driver. What is free in one cannot
be joined with what is free in another, and after batches of all sizes a step may find no room
though enough is free. With expandable segments a piece is a range of addresses, into which memory
is mapped as it is needed.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLE = "PYTORCH_ALLOC_CONF"  # torch's name since 2.9
SETTING = "expandable_segments:True"
# Torch reads one of these variables alone, and which of them comes first differs between versions.
_NAMES = (VARIABLE, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def prefer_growing_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets it for this process and those it starts, unless the user configures torch's allocator.

    To be called before torch is imported, which reads a part of it then.
    """
    if not any(name in environment for name in _NAMES):
        environment[VARIABLE] = SETTING
