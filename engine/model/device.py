"""Which device a model runs on, and why a GPU that the machine has cannot be used.

Without a device of its own, a GPU that torch cannot see would silently become a CPU, in float32:
right, and a hundred times slower than what was paid for. So that stops the start with one line.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import torch

from ..protocol.errors import ModelLoadError, first_line

logger = logging.getLogger(__name__)

_DEVICE_FILES = Path("/dev")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_SMI_TIMEOUT_S = 20.0  # without its daemon it wakes up each GPU first


def choose_device(wanted: str | None) -> torch.device:
    """The device to load a model onto.

    Args:
        wanted: "cuda", "cpu", or None for a GPU if there is one.

    Raises:
        ModelLoadError: a GPU is wanted, or the machine has one, and torch cannot use it.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wanted is None and _are_hidden():
        logger.info("CUDA_VISIBLE_DEVICES hides all GPUs: the model runs on the CPU")
        return torch.device("cpu")
    if wanted is None and not _has_nvidia_gpu():
        return torch.device("cpu")
    raise ModelLoadError(f"{_why_not()}; --device cpu runs the model on the CPU")


def _are_hidden() -> bool:
    """Whether the environment asks for no GPU at all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _has_nvidia_gpu() -> bool:
    """Whether this machine has a GPU of NVIDIA, whatever torch sees of it."""
    if any(path.name[6:].isdigit() for path in _DEVICE_FILES.glob("nvidia*")):
        return True
    command = shutil.which("nvidia-smi")  # where there are no such files, as in WSL
    if command is None:
        return False
    try:
        listed = subprocess.run(  # noqa: S603  a fixed argument
            [command, "-L"], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def _why_not() -> str:
    """Why torch cannot use a GPU, in one line."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} cannot use an NVIDIA GPU: it is built without CUDA"
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # torch knows the driver's version, and what is wrong with it
        return f"{built} and cannot use this machine's GPU ({_driver()}): {first_line(error)}"
    return f"{built} and finds no GPU ({_driver()})"


def _driver() -> str:
    """The driver's version, as the kernel module tells it."""
    try:
        words = _DRIVER_FILE.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return "no NVIDIA driver is loaded"
    versions = [word for word in words if word[:1].isdigit() and "." in word]
    return f"driver {versions[0]}" if versions else "a driver of unknown version"
