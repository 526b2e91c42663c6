"""An engine on a random model that is divided among the GPUs of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.local_engine import LocalEngine
from benchmarks.random_model import build
from engine.build import build_engine
from engine.heartbeat import Activity
from engine.protocol.config import EngineConfig
from engine.ranks.leader import Leader


@contextmanager
def divided_engine(
    config: Any, dtype: torch.dtype, num_shards: int, **settings: Any
) -> Iterator[LocalEngine]:
    """Builds an engine with as many ranks; its checkpoint is on the disk for as long as it runs."""
    with tempfile.TemporaryDirectory() as folder:
        build(config, torch.device("cpu"), dtype).save_pretrained(folder)
        engine_config = EngineConfig(
            model_id=folder,
            socket_path=Path(folder) / "unused.sock",
            device="cuda",
            dtype=str(dtype).removeprefix("torch."),
            num_shards=num_shards,
            **settings,
        )
        with Leader(engine_config, Activity()) as leader:
            engine, info = build_engine(engine_config, ranks=leader.ranks)
            yield LocalEngine(engine, info.attention)
