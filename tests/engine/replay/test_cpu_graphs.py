"""Replayed steps give the model's logits, and other steps are computed by the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from engine.attention.kv_cache import KVCache
from engine.batch.model_input import ModelInput
from engine.batch.recorded_rows import TableWidths, blank, copy_rows
from engine.engine import Engine
from engine.executor import Forward
from engine.kernels import cpu as cpu_kernels
from engine.kernels.int4 import PackedInt4Linear
from engine.kernels.int8 import PackedInt8Linear
from engine.kernels.packed_linear import pack_model
from engine.model.loaded import LoadedModel
from engine.model.model_runner import ModelRunner
from engine.model.passes import fuse_layers, fuse_rotation
from engine.model.quantization import Scheme, apply
from engine.model.quantized_linear import Int4Linear
from engine.model.self_check import attach_paged_attention
from engine.replay import cpu_graphs
from engine.replay.cpu_graphs import CpuGraphs
from engine.sampling.watermark import Watermark
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from tests.engine.fakes import CPU
from tests.engine.loads import Arrival, arrivals, assert_same_answers, run_load
from tests.engine.model.architectures import build_model
from tests.engine.native import kernels_for

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK_SIZE = 4
MAX_BLOCKS = 8
NUM_BLOCKS = 16
VOCAB_SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def kernels() -> cpu_kernels.CpuKernels:
    return kernels_for("whole")


def make_model(kernels: cpu_kernels.CpuKernels) -> LoadedModel:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    loaded = attach_paged_attention(build_model(config), CPU, torch.float32)
    fuse_rotation(loaded, kernels)
    fuse_layers(loaded)
    return loaded


def make_forward(loaded: LoadedModel, kernels: cpu_kernels.CpuKernels) -> Forward:
    cache = KVCache(loaded.layers, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
    return ModelRunner(loaded, cache, kernels).forward


@cache
def packed_model() -> LoadedModel:
    kernels = kernels_for("whole")
    loaded = make_model(kernels)
    pack_model(loaded.model, kernels)
    return loaded


def graphed(forward: Forward, **options: Any) -> CpuGraphs:
    sizes = {"max_tokens": 16, "widths": TableWidths(MAX_BLOCKS)} | options
    return CpuGraphs(forward, kernels_for("whole"), **sizes)


def make_engine(forward: Forward, max_draft_tokens: int, runs_ahead: bool = False) -> Engine:
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, BLOCK_SIZE),
        max_step_tokens=24,
        max_num_seqs=8,
        max_draft_tokens=max_draft_tokens,
    )
    watermark = Watermark(VOCAB_SIZE, CPU)
    return Engine(forward, scheduler, CPU, watermark=watermark, runs_ahead=runs_ahead)


@given(load=arrivals(), runs_ahead=st.booleans(), max_draft_tokens=st.sampled_from([0, 3]))
def test_answers_are_bit_for_bit_those_without_graphs(
    kernels: cpu_kernels.CpuKernels,
    load: list[Arrival],
    runs_ahead: bool,
    max_draft_tokens: int,
) -> None:
    plain, repeated = (make_forward(packed_model(), kernels) for _ in range(2))
    expected = run_load(make_engine(plain, max_draft_tokens), load)
    steps = graphed(repeated)
    actual = run_load(make_engine(steps, max_draft_tokens, runs_ahead), load)
    assert_same_answers(load, expected, actual)


def decode(num_seqs: int, token_id: int = 3, position: int = 1) -> ModelInput:
    """A decode step of several sequences with the same token, each with a block of its own."""
    rows = blank(num_seqs, num_seqs, num_seqs, TableWidths(MAX_BLOCKS), CPU)
    rows.input_ids.fill_(token_id)
    rows.positions.fill_(position)
    blocks = torch.arange(num_seqs)
    rows.attention.slot_mapping.copy_(blocks * BLOCK_SIZE + position)
    rows.attention.block_tables[:, 0] = blocks
    rows.attention.query_start_loc.copy_(torch.arange(num_seqs + 1))
    rows.attention.context_lens.fill_(position + 1)
    rows.logits_rows.copy_(blocks)
    return rows


class Counting:
    """Counts how often the model itself is called."""

    def __init__(self, forward: Callable[[ModelInput], Tensor]) -> None:
        self.num_calls = 0
        self._forward = forward

    def __call__(self, batch: ModelInput) -> Tensor:
        self.num_calls += 1
        return self._forward(batch)


def test_a_shape_that_occurs_again_is_recorded_and_then_replayed(
    kernels: cpu_kernels.CpuKernels,
) -> None:
    model = Counting(make_forward(packed_model(), kernels))
    steps = graphed(model)
    calls, graphs, replays = [], [], []
    for token_id in range(5):
        steps(decode(2, token_id))
        replays.append(steps.num_replays)
        calls.append(model.num_calls)
        graphs.append(steps.num_graphs)
    assert calls == [1, 2, 2, 2, 2]
    assert graphs == [0, 1, 1, 1, 1]
    assert replays == [0, 0, 1, 2, 3]


def test_only_small_steps_are_recorded(kernels: cpu_kernels.CpuKernels) -> None:
    steps = graphed(make_forward(packed_model(), kernels), max_tokens=3)
    for size in (3, 4):
        for _ in range(3):
            steps(decode(size))
    assert steps.num_graphs == 1


def test_a_context_too_long_for_graphs_is_not_replayed(
    kernels: cpu_kernels.CpuKernels,
) -> None:
    forward = make_forward(packed_model(), kernels)
    steps = graphed(forward)
    for _ in range(2):
        steps(decode(1))
    wide = blank(1, 1, 1, TableWidths(MAX_BLOCKS + 1), CPU)
    copy_rows(wide, decode(1, token_id=5))
    wide.attention.query_start_loc[1] = 1
    assert torch.equal(steps(wide), forward(wide))


def test_the_least_recently_used_graph_is_dropped(
    kernels: cpu_kernels.CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_graphs, "_MAX_GRAPHS", 2)
    monkeypatch.setattr(cpu_graphs, "_MIN_SIGHTINGS_WHEN_FULL", 3)
    model = Counting(make_forward(packed_model(), kernels))
    steps = graphed(model)
    for size in (1, 2, 1, 2, 1, 3, 3, 3):  # 1 was used after 2
        steps(decode(size))
    assert steps.num_graphs == 2
    calls = []
    for size in (1, 3, 2):
        before = model.num_calls
        steps(decode(size))
        calls.append(model.num_calls - before)
    assert calls == [0, 0, 1]


def test_too_many_shapes_are_rarely_recorded(
    kernels: cpu_kernels.CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_graphs, "_MAX_GRAPHS", 2)
    steps = graphed(make_forward(packed_model(), kernels))
    recorded = []
    record = steps._record
    monkeypatch.setattr(steps, "_record", lambda *args: recorded.append(args[0]) or record(*args))
    for _ in range(70):
        for size in (1, 2, 3):
            steps(decode(size))
    assert len(recorded) <= 2 + 3 * 70 // cpu_graphs._MIN_SIGHTINGS_WHEN_FULL


def scheme(name: str) -> Scheme:
    if name == "int4":
        return Scheme(name, PackedInt4Linear.from_linear, PackedInt4Linear.fits)
    if name == "int4 of torch":
        return Scheme(name, Int4Linear.from_linear, Int4Linear.fits)
    plain = Scheme(name, PackedInt8Linear.from_linear, lambda weight: True)
    return replace(plain, output=plain)


@pytest.mark.parametrize("name", ["int8", "int4", "int4 of torch"])
def test_quantised_layers_are_replayed_too(kernels: cpu_kernels.CpuKernels, name: str) -> None:
    loaded = make_model(kernels)
    apply(loaded.model, scheme(name))
    pack_model(loaded.model, kernels)
    steps = graphed(make_forward(loaded, kernels))
    steps.verify(MAX_BLOCKS * BLOCK_SIZE - 1, BLOCK_SIZE)
    assert steps.num_graphs == 1


def counts_on_the_host(forward: Forward) -> Forward:
    calls = iter(range(1000))
    return lambda batch: forward(batch) + next(calls)


def reads_a_number(forward: Forward) -> Forward:
    return lambda batch: forward(batch) * float(batch.positions.max().item() + 1)


@pytest.mark.parametrize("wrap", [counts_on_the_host, reads_a_number])
def test_a_model_that_cannot_be_replayed_is_called_every_time(
    kernels: cpu_kernels.CpuKernels, wrap: Callable[[Forward], Forward]
) -> None:
    model = Counting(wrap(make_forward(packed_model(), kernels)))
    steps = graphed(model)
    steps.verify(MAX_BLOCKS * BLOCK_SIZE - 1, BLOCK_SIZE)
    assert steps.num_graphs == 0
    before = model.num_calls
    for _ in range(4):
        steps(decode(1))
    assert model.num_calls == before + 4


def test_a_model_that_reads_a_number_gives_its_own_logits_while_it_is_recorded(
    kernels: cpu_kernels.CpuKernels,
) -> None:
    model = reads_a_number(make_forward(packed_model(), kernels))
    steps = graphed(model)
    for _ in range(3):
        assert torch.equal(steps(decode(1)), model(decode(1)))


def test_a_batch_with_a_narrower_block_table_than_before_gives_its_own_logits(
    kernels: cpu_kernels.CpuKernels,
) -> None:
    forward = make_forward(packed_model(), kernels)
    steps = graphed(forward)
    for _ in range(2):
        steps(decode(1))
    narrow = decode(1, token_id=5)
    narrow = replace(
        narrow,
        attention=replace(
            narrow.attention, block_tables=narrow.attention.block_tables[:, :1].contiguous()
        ),
    )
    assert torch.equal(steps(narrow).clone(), forward(narrow))
