"""An engine on a random model that is made in memory and never written to disk."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.local_engine import LocalEngine
from benchmarks.random_model import build
from engine.build import build_engine
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig


def random_engine(
    config: Any, device: torch.device, dtype: torch.dtype, **settings: Any
) -> LocalEngine:
    """Builds an engine from the configuration of a model; settings are those of `EngineConfig`."""
    model = build(config, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        engine_config = EngineConfig(
            model_id=folder,
            socket_path=Path(folder) / "unused.sock",
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            **settings,
        )
        built, info = build_engine(
            engine_config, lambda _: attach_paged_attention(model, device, dtype)
        )
        return LocalEngine(built, info.attention)


def release(device: torch.device) -> None:
    """Frees device memory that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
