"""The cache never gets more memory than is free, and always enough for the longest sequence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.model_input import ModelInput
from engine.block_form import BlockForm
from engine.executor import Executor
from engine.memory.cache_size import (
    most_tokens,
    num_blocks,
    num_state_copies,
    num_state_slots,
    room_for_cache,
)
from engine.memory.worst_step import StepBounds
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.sampling import sampler
from tests.engine.fakes import CPU

GPU = torch.device("cuda")
MIB = 1024**2
VOCAB_SIZE = 2**16


def config(**options: Any) -> EngineConfig:
    return EngineConfig(model_id="m", socket_path=Path("s"), **options)


@given(
    room=st.integers(-MIB, 64 * MIB),
    bytes_per_token=st.integers(1, 4096),
    block_size=st.sampled_from([1, 16, 24, 128]),
    limit=st.integers(2, 5000),
    asked=st.none() | st.integers(1, 20_000),
    device=st.sampled_from([CPU, GPU]),
)
def test_all_blocks_fit_and_the_longest_sequence_fits_into_them(
    room: int,
    bytes_per_token: int,
    block_size: int,
    limit: int,
    asked: int | None,
    device: torch.device,
) -> None:
    wanted = config(block_size=block_size, max_batch_total_tokens=asked)
    try:
        blocks = num_blocks(wanted, room, bytes_per_token * block_size, limit, device)
    except ModelLoadError as error:
        reasons = "Not enough memory|`max_batch_total_tokens="
        assert re.match(reasons, str(error))  # noqa: PT017 - both outcomes are right
        fitting = room // bytes_per_token
        assert (
            fitting < 4 * (limit + block_size)
            or (asked is not None and asked < limit)
            or (asked is not None and asked + block_size > fitting)
        )
        return
    assert blocks * block_size * bytes_per_token <= room
    assert blocks * block_size >= limit
    if asked is not None:
        assert asked <= blocks * block_size < asked + block_size


@given(
    room=st.integers(0, 64 * MIB),
    bytes_per_block=st.integers(1, 100_000),
    window=st.integers(1, 300),
    ratio=st.integers(0, 6),
    limit=st.integers(2, 5000),
    max_step_tokens=st.integers(1, 400),
    asked=st.none() | st.integers(1, 20_000),
    device=st.sampled_from([CPU, GPU]),
)
def test_blocks_of_both_kinds_fit_and_hold_the_longest_sequence_and_what_was_asked_for(
    room: int,
    bytes_per_block: int,
    window: int,
    ratio: int,
    limit: int,
    max_step_tokens: int,
    asked: int | None,
    device: torch.device,
) -> None:
    form = BlockForm(window=window, block_size=16, ratio=ratio)
    wanted = config(max_batch_total_tokens=asked, max_step_tokens=max_step_tokens)
    needed = form.num_blocks(limit, max_step_tokens)
    try:
        blocks = num_blocks(wanted, room, bytes_per_block, limit, device, form)
    except ModelLoadError as error:
        assert f"takes {needed + 1}" in str(error)  # noqa: PT017 - both outcomes are right
        return
    assert blocks * bytes_per_block <= room
    assert blocks - 1 >= needed, "one is nobody's"
    if asked is not None:  # in sequences of a block, or of any length
        each = -(-asked // 16) + (-(-asked // form.whole_size) if ratio else 0)
        assert blocks - 1 == each
    assert most_tokens(blocks, 16, limit, form) >= min(asked or 0, limit)
    most = most_tokens(blocks, 16, limit, form)
    assert most // limit * form.num_blocks(limit) <= blocks - 1


@given(room=st.integers(-MIB, 64 * MIB), wanted=st.integers(1, 256), size=st.integers(1, MIB))
def test_states_take_half_of_the_room_at_most(room: int, wanted: int, size: int) -> None:
    fitting = max(0, room) // 2 // size
    if fitting:
        assert num_state_slots(wanted, room, size) == min(wanted, fitting)
    else:
        with pytest.raises(ModelLoadError, match=f"the state of a sequence: it takes {size} bytes"):
            num_state_slots(wanted, room, size)


@given(
    room=st.integers(0, 64 * MIB),
    per_slot=st.integers(1, MIB),
    per_block=st.integers(0, 100_000),
    limit=st.integers(2, 5000),
    asked=st.none() | st.integers(1, 100_000),
    device=st.sampled_from([CPU, GPU]),
)
def test_kept_states_leave_the_cache_what_it_needs(
    room: int, per_slot: int, per_block: int, limit: int, asked: int | None, device: torch.device
) -> None:
    wanted = config(max_batch_total_tokens=asked)
    copies = num_state_copies(wanted, room, per_slot, per_block, limit, device)
    assert 0 <= copies * per_slot <= room * 0.2
    left = room - copies * per_slot
    needed = -(-max(limit, asked or 0) // 16)
    if per_block and needed * per_block <= room:
        assert needed * per_block <= left
    tokens = room // per_block * 16 if per_block and device is GPU else max(16_384, needed * 16)
    assert copies <= -(-tokens // 256)


def test_a_cache_that_was_asked_to_be_too_small_is_not_called_a_want_of_memory() -> None:
    wanted = config(max_batch_total_tokens=100)
    names = "`max_batch_total_tokens=100` is less than .* `max_total_tokens=400` takes 25"
    with pytest.raises(ModelLoadError, match=names):
        num_blocks(wanted, 64 * MIB, 1024, 400, CPU)


def test_a_gpu_does_not_count_endless_blocks_of_a_model_without_a_kv_cache() -> None:
    assert num_blocks(config(), 1 << 40, 0, 64, GPU) == 1 << 18


def test_a_model_without_a_kv_cache_has_blocks_that_take_nothing() -> None:
    assert num_blocks(config(), 16 * MIB, 0, 64, CPU) == 1024


def test_the_cache_takes_all_memory_of_a_gpu_but_not_of_a_cpu() -> None:
    room = 1000 * 16 * 1024
    assert num_blocks(config(), room * 4, 1024 * 16, 64, GPU) == 4000
    assert num_blocks(config(), room * 4, 1024 * 16, 64, CPU) == 1024


class FakeGpu:
    """A device of 1000 MiB; the model takes 200, and a step as many as `cost` returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        self.cost: Callable[[int, int], int] = lambda num_tokens, _: num_tokens // 10
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 200 * MIB)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: self.peak + 200 * MIB)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (800 * MIB, 1000 * MIB))

    def forward(self, batch: ModelInput) -> torch.Tensor:
        """Allocates the memory of a step with this number of tokens and sequences."""
        num_tokens, num_seqs = len(batch.input_ids), len(batch.attention.context_lens)
        self.peak = self.cost(num_tokens, num_seqs) * MIB
        return torch.zeros(len(batch.logits_rows), VOCAB_SIZE)


BOUNDS = StepBounds(
    max_total_tokens=512,
    max_step_tokens=1000,
    max_num_seqs=50,
    max_logprob_rows=16,
    max_draft_tokens=0,
    block_size=16,
)


def test_the_largest_step_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    executor = Executor(gpu.forward, CPU, BOUNDS.block_size)
    room = room_for_cache(config(memory_fraction=0.9, graph_sizes=()), executor, BOUNDS, GPU)
    model, prefill = 200, 100
    assert room == (900 - model - prefill) * MIB


def test_a_step_of_prompts_beside_many_decoding_sequences_may_be_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.cost = lambda num_tokens, num_seqs: (num_tokens + num_seqs) // 10
    executor = Executor(gpu.forward, CPU, BOUNDS.block_size)
    room = room_for_cache(config(memory_fraction=0.9, graph_sizes=()), executor, BOUNDS, GPU)
    model, mixed = 200, (1000 + 50 + 2) // 10
    assert room == (900 - model - mixed) * MIB


@pytest.mark.parametrize(
    ("max_step_tokens", "recorded", "num_rows"),
    [(40, 3, 32), (300, 25, 32), (1000, 51, 50)],
    ids=["no prompts", "prompts of few sequences", "prompts of all sequences"],
)
def test_recorded_steps_keep_the_memory_of_the_largest_forward(
    max_step_tokens: int, recorded: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch)
    executor = Executor(gpu.forward, CPU, BOUNDS.block_size)
    sizes = {"graph_sizes": (1, 32, 64), "max_num_seqs": 50}  # there are never 64 sequences
    wanted = config(memory_fraction=0.9, max_step_tokens=max_step_tokens, **sizes)
    room = room_for_cache(wanted, executor, BOUNDS, GPU)
    model, prefill, logits = 200, 100, num_rows * 4 * VOCAB_SIZE / MIB
    assert room == (900 - model - prefill - recorded - logits) * MIB


def test_a_greedy_step_is_computed_before_the_first_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It chooses its tokens with a kernel that no other step of the start-up uses."""
    gpu, draws = FakeGpu(monkeypatch), []
    choose = sampler.choose
    monkeypatch.setattr(
        sampler,
        "choose",
        lambda scores, drawn: draws.append(drawn is None) or choose(scores, drawn),
    )
    executor = Executor(gpu.forward, CPU, BOUNDS.block_size)
    room_for_cache(config(), executor, BOUNDS, GPU)
    assert set(draws) == {True, False}


def test_too_little_memory_for_a_step_is_refused_naming_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeGpu(monkeypatch)

    def exhausted(_: ModelInput) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    executor = Executor(exhausted, CPU, BOUNDS.block_size)
    with pytest.raises(ModelLoadError, match="--max-batch-prefill-tokens"):
        room_for_cache(config(), executor, BOUNDS, GPU)


def test_a_device_error_is_not_reported_as_too_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeGpu(monkeypatch)

    def broken(_: ModelInput) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    executor = Executor(broken, CPU, BOUNDS.block_size)
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        room_for_cache(config(), executor, BOUNDS, GPU)


def test_a_cpus_free_memory_is_room_for_the_cache() -> None:
    executor = Executor(lambda _: torch.zeros(0), CPU, BOUNDS.block_size)
    assert room_for_cache(config(), executor, BOUNDS, CPU) > 64 * MIB
