"""Exchanges through memory give every rank what all have, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.kernel import listening
from engine.replay.cpu_recorder import Arena, CpuGraphRecorder
from engine.shards.exchange import Exchange, SharedMemory
from engine.shards.group import open_store
from tests.engine.native import needs_compiler

pytestmark = needs_compiler

SIZES = (1, 7, 64 * 1024, 300_001)  # numbers; what is above a piece of memory takes several


class Ranks:
    """Ranks that are threads, since kernels let others run meanwhile."""

    def __init__(self, size: int) -> None:
        kernels = cpu.load()
        assert kernels is not None
        self.kernels = kernels
        num_bytes = kernels.exchange_bytes(size)
        memory = torch.zeros(num_bytes + 4096, dtype=torch.uint8)
        begin = -memory.data_ptr() % 4096
        self.memory = memory[begin : begin + num_bytes]
        self.ends = [Exchange(kernels, self.memory, rank, size) for rank in range(size)]
        self._threads = ThreadPoolExecutor(size)

    def each(self, compute: Callable[[int, Exchange], Tensor]) -> list[Tensor]:
        """What each rank computes, at the same time."""
        futures = [self._threads.submit(compute, rank, end) for rank, end in enumerate(self.ends)]
        return [future.result(timeout=60) for future in futures]


def _parts(size: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [(torch.randn(shape, generator=generator) * 100).to(dtype) for _ in range(size)]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_all_ranks_get_the_sum_in_their_order(size: int) -> None:
    ranks = Ranks(size)
    for n in SIZES:
        parts = _parts(size, n)
        expected = parts[0].clone()
        for part in parts[1:]:
            expected += part
        for _ in range(3):  # each piece of memory is used again
            for total in ranks.each(lambda rank, end, parts=parts: end.sum(parts[rank])):  # type: ignore[misc]
                assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_all_ranks_get_the_tensors_of_all(dtype: torch.dtype) -> None:
    ranks = Ranks(3)
    for shape in ((1,), (2, 3), (5, 100_003), (3, 1, 7)):
        parts = _parts(3, *shape, dtype=dtype)
        for gathered in ranks.each(lambda rank, end, parts=parts: end.gather(parts[rank])):  # type: ignore[misc]
            assert torch.equal(gathered, torch.stack(parts))
        for row in ranks.each(lambda rank, end, parts=parts: end.concatenate(parts[rank])):  # type: ignore[misc]
            assert torch.equal(row, torch.cat(parts, dim=-1))


def test_a_rank_that_comes_late_is_waited_for_without_a_processor() -> None:
    """The other one has stopped looking at its sign by then, and is woken."""
    ranks = Ranks(2)
    sleepers = ranks.memory.view(torch.int32)[16 + 1]  # of the second rank's sign
    one = torch.ones(3)

    def first(rank: int, end: Exchange) -> Tensor:
        if rank == 1:
            while not int(sleepers):
                pass
        return end.sum(one)

    assert [total.tolist() for total in ranks.each(first)] == [[2.0] * 3] * 2


@pytest.mark.parametrize("count", [0xFFFF_FFFE, 0x7FFF_FFFF])
def test_the_numbers_of_exchanges_may_begin_again(count: int) -> None:
    """After four thousand million exchanges, some days."""
    import ctypes

    ranks = Ranks(2)
    signs = ranks.memory.view(torch.int32)
    for rank, end in enumerate(ranks.ends):
        signs[16 * rank] = count - (1 << 32) if count >= 1 << 31 else count
        ctypes.c_uint32.from_address(end._address + 32).value = count
    parts = _parts(2, 5)
    for _ in range(4):
        for total in ranks.each(lambda rank, end: end.sum(parts[rank])):
            assert torch.equal(total, parts[0] + parts[1])


def test_a_recorded_exchange_is_made_again_with_other_numbers() -> None:
    ranks = Ranks(2)
    inputs = [part.clone() for part in _parts(2, 4)]

    def record(rank: int, end: Exchange) -> Tensor:
        recorder = CpuGraphRecorder(Arena(), ranks.kernels)
        with torch.inference_mode(), listening(recorder.record_call), recorder:
            result = end.concatenate(end.sum(inputs[rank]))
        graph = recorder.graph()
        inputs[rank].copy_(torch.full((4,), 10.0 + rank))
        graph.replay()
        return result

    for replayed in ranks.each(record):
        assert replayed.tolist() == [21.0] * 8


def test_ranks_that_cannot_share_memory_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError("not here")

    monkeypatch.setattr("os.memfd_create", refused)
    store = open_store(tmp_path / "meeting", 2)
    memories = [SharedMemory(store, rank, 4096) for rank in range(2)]
    assert [memory.tensor for memory in memories] == [None, None]
    assert "through sockets: not here" in caplog.text
