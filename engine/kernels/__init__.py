"""Kernels in C and Triton, the layers that hold their weights, and the build of the C ones.

They know tensors only: no model, no sequence, and not which attention was chosen.
"""

import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Whether Triton is installed, which the GPU kernels need.

    Their modules are imported where they are used, since Triton is large and useless on a CPU.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        logger.warning("Triton is not installed: a GPU computes without kernels of our own")
        return False
    return True
