"""Helpers of the tests of quantised models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from engine.protocol.config import EngineConfig


def config(path: Path, quantize: str | None, **options: Any) -> EngineConfig:
    return EngineConfig(
        model_id=str(path),
        socket_path=path / "socket",
        device="cpu",
        num_threads=1,
        quantize=quantize,
        **options,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).std() / expected.std()).detach())
