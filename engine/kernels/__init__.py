"""Native kernels and their build."""

import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Whether kernels for GPUs can be had. They are imported where they are needed.

    Triton is large, and of no use on a CPU.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        logger.warning("Triton is not installed: a GPU computes without kernels of our own")
        return False
    return True
