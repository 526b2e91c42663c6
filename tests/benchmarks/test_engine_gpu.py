"""The GPU benchmark gets the steps that it wants to measure: real sizes and scheduler, no model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import engine_gpu
from benchmarks.engine_gpu import BLOCK_SIZE, Bench, Sizes
from benchmarks.local_engine import LocalEngine
from benchmarks.model_costs import costs
from engine.batch.model_input import ModelInput
from engine.engine import Engine
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler

CPU = torch.device("cpu")
NUM_TOKENS = 350_000  # a KV cache that fits on a GPU of 80 GB
MIN_STEPS = 32


def forward(batch: ModelInput) -> Tensor:
    """A model without parameters."""
    return torch.zeros(len(batch.logits_rows), 8)


def without_model(_: Any, __: torch.device, ___: torch.dtype, **settings: Any) -> LocalEngine:
    """An engine with these settings that runs ahead, as on a GPU, and computes nothing."""
    scheduler = Scheduler(
        BlockManager(NUM_TOKENS // BLOCK_SIZE, BLOCK_SIZE),
        max_step_tokens=settings["max_step_tokens"],
        max_chunk_tokens=settings["max_chunk_tokens"],
        max_num_seqs=256,
    )
    return LocalEngine(Engine(forward, scheduler, CPU, runs_ahead=True), "none")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A benchmark of a device with known ceilings, whose engines compute nothing."""
    monkeypatch.setattr(engine_gpu, "random_engine", without_model)
    return Bench(
        CPU, torch.bfloat16, Sizes(), tiny=False, memory_bytes_per_s=3e12, matmul_flop_per_s=9e14
    )


@pytest.mark.parametrize("batch", Sizes().batches)
def test_load_has_enough_steps_that_only_decode_all_rows(bench: Bench, batch: int) -> None:
    local = bench.engine(bench.llama(), None)
    load = engine_gpu._decode_load(bench, bench.llama(), batch)
    assert len(local.run(load.items(batch)).decode_steps(batch)) >= MIN_STEPS


def test_large_model_yields_all_figures(bench: Bench) -> None:
    engine_gpu.large_model(bench)
    assert bench.errors == {}
    names = {figure.name for figure in bench.figures}
    assert {"8B, decode, 64 rows", "8B, decode, 256 rows", "8B, 64 rows, a step"} <= names


def test_profiler_gets_enough_full_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "device", torch.device("cuda"))
    monkeypatch.setattr(engine_gpu, "device_busy_s", lambda work, _: work() or 1e-6)
    engine_gpu._idle(bench, bench.engine(bench.llama(), None), bench.llama(), 64, "8B")
    assert bench.errors == {}
    assert [figure.name for figure in bench.figures][-1] == "8B, 64 rows, device idle per step"


def test_unmeasurable_figure_is_reported_as_an_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bench.llama()
    local = bench.engine(
        config, None, max_chunk_tokens=1024
    )  # most sequences end before the last begins
    engine_gpu._decode(bench, local, config, costs(config, bench.dtype), 256, "8B")
    monkeypatch.setattr(bench, "device", torch.device("cuda"))
    monkeypatch.setattr(engine_gpu, "device_busy_s", lambda work, _: work())
    engine_gpu._idle(bench, local, config, 8, "8B")
    assert set(bench.errors) == {"8B, decode, 256 rows", "8B, 8 rows, device idle per step"}
    assert [figure.name for figure in bench.figures] == ["8B, 8 rows, a step"]
