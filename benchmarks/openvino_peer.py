"""OpenVINO GenAI as a peer: its continuous batching, on GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.peer_process import Package, PeerProcess, peer_process

PACKAGE = Package("openvino-genai", "2026.4.1.0")
_WORKER = Path(__file__).with_name("openvino_worker.py")


def openvino(
    model: Path, precision: str, threads: int, environment: Mapping[str, str]
) -> AbstractContextManager[PeerProcess]:
    """Loads a GGUF file; it computes in a precision of OpenVINO's: f32, f16 or bf16.

    Raises:
        PeerAbsentError: it cannot be installed.
    """
    python = str(PACKAGE.home() / "bin" / "python")
    command = [python, str(_WORKER), str(model), precision, str(threads)]
    return peer_process("OpenVINO GenAI", command, environment)
