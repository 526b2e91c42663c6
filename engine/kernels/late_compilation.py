"""Tells of kernels that Triton compiles while requests wait for them.

All that serving needs should have been compiled by the steps of the start-up. One that was missed
holds up every request for about a second, once after each start, and nothing else shows it.
"""

from __future__ import annotations

import logging
from typing import Any

from . import has_triton

logger = logging.getLogger(__name__)


def warn_of_compilations() -> None:
    """From now on logs each kernel that is compiled; without Triton there are none."""
    if not has_triton():
        return
    import triton

    triton.knobs.runtime.jit_post_compile_hook = _warn


def _warn(**told: Any) -> None:
    """Triton calls this after each compilation, and after loading one from its cache on disk."""
    logger.warning("compiled while requests wait: %s", told.get("repr"))
