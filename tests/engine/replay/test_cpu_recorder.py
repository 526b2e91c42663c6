"""A graph computes what the recorded program computes, for any numbers in its inputs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu import CpuKernels
from engine.kernels.kernel import Call, listening
from engine.replay.cpu_recorder import Arena, CpuGraph, CpuGraphRecorder, NotRepeatableError
from tests.engine.native import kernels_for

SHAPE = (3, 4)
WEIGHT = torch.randn(4, generator=torch.Generator().manual_seed(1))
SQUARE = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
KEPT = torch.ones(SHAPE)


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    packed_square()  # packed here, before anything is recorded
    return kernels_for("whole")


@cache
def packed_square() -> Tensor:
    return kernels_for("whole").pack_weight(SQUARE)


# Each takes two tensors of SHAPE and gives one.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "residual": lambda a, b: a + b,
    "scaled sum": lambda a, b: torch.add(a, b, alpha=2),
    "number": lambda a, b: a * 0.5 + 1.0,
    "view": lambda a, b: a.contiguous().view(4, 3).t().reshape(SHAPE),
    "strided": lambda a, b: a.t().contiguous().t() + b,
    "in place": lambda a, b: a.clone().mul_(b),
    "overwritten input": lambda a, b: a.tanh_(),
    "overwritten part": lambda a, b: _overwrite_a_part(a, b),
    "transposed in place": lambda a, b: a.clone().t_().clone().t_(),
    "joined": lambda a, b: torch.cat([a, b])[1:4],
    "halves": lambda a, b: torch.cat(a.chunk(2, dim=-1)[::-1], dim=-1),
    "without inputs": lambda a, b: torch.arange(4.0).expand(SHAPE).clone().sub_(b),
    "from a list": lambda a, b: torch.tensor([1.0, 2.0, 3.0, 4.0]) * a,
    "zeros": lambda a, b: torch.zeros_like(a).add_(b),
    "several results": lambda a, b: a.max(dim=-1, keepdim=True).values * b,
    "layer norm": lambda a, b: F.layer_norm(a, (4,), WEIGHT),
    "rows": lambda a, b: a[torch.tensor([2, 0, 1])],
    "rows of a batch": lambda a, b: a.contiguous()[None][:, torch.tensor([2, -1, 0])][0],
    "embedding": lambda a, b: F.embedding(torch.tensor([[3, 0, 1]]), SQUARE)[0] * b,
    "formats": lambda a, b: (a.double() * b.double()).float(),
    "choice": lambda a, b: torch.where(a > b, a, b),
    "product": lambda a, b: F.linear(a, SQUARE),
    "dropout in evaluation": lambda a, b: F.dropout(a, 0.5, training=False),
    "norm kernel": lambda a, b: kernels_for("whole").rms_norm(a.tanh(), WEIGHT, 1e-5),
    "linear kernel": lambda a, b: kernels_for("whole").linear(a.cos(), packed_square(), None, 4),
    "gate kernel": lambda a, b: kernels_for("whole").silu_and_mul(a.contiguous(), b.contiguous()),
}
Program = list[tuple[str, int, int, bool]]  # operation, operands, whether the first is dropped


def _overwrite_a_part(a: Tensor, b: Tensor) -> Tensor:
    result = a.clone()
    result[1:].copy_(b[1:])
    return result


def execute(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """Runs a program; returns all tensors that it has not dropped."""
    pool = [x.clone(), y.clone()]
    for name, first, second, drops in program:
        pool.append(OPERATIONS[name](pool[first % len(pool)], pool[second % len(pool)]))
        if drops:
            del pool[first % len(pool)]
    return torch.stack(pool)


def record(
    run: Callable[[], Tensor], kernels: CpuKernels, arena: Arena | None = None
) -> tuple[CpuGraph, Tensor]:
    recorder = CpuGraphRecorder(arena or Arena(), kernels)
    with listening(recorder.record_call), recorder:
        result = run()
    return recorder.graph(), result


def values(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


programs = st.lists(
    st.tuples(
        st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9), st.booleans()
    ),
    min_size=1,
    max_size=12,
)


@torch.inference_mode()
@given(program=programs, seed=st.integers(0, 99))
def test_any_program_is_replayed_with_other_numbers(
    kernels: CpuKernels, program: Program, seed: int
) -> None:
    x, y = values(seed)
    graph, result = record(lambda: execute(program, x, y), kernels)
    assert torch.equal(result, execute(program, x, y))
    for later in (seed + 1, seed + 2):
        for tensor, value in zip((x, y), values(later), strict=True):
            tensor.copy_(value)
        graph.replay()
        assert torch.equal(result, execute(program, x, y))


@torch.inference_mode()
@given(first=programs, second=programs)
def test_graphs_share_an_arena(kernels: CpuKernels, first: Program, second: Program) -> None:
    arena, (x, y) = Arena(), values(0)
    recorded = []
    for program in (first, second):
        graph, result = record(lambda p=program: execute(p, x, y), kernels, arena)  # type: ignore[misc]
        recorded.append((program, graph, result.detach()))
        del result
    for seed in (1, 2):
        for program, graph, result in recorded:
            for tensor, value in zip((x, y), values(seed), strict=True):
                tensor.copy_(value)
            graph.replay()
            assert torch.equal(result, execute(program, x, y))


@torch.inference_mode()
def test_memory_is_reused_within_a_graph_and_by_the_next_one(kernels: CpuKernels) -> None:
    def deep(x: Tensor) -> Tensor:
        for _ in range(50):
            x = F.layer_norm(x * 2.0 + x, (4,))
        return x

    arena, (x, _) = Arena(), values(0)
    record(lambda: deep(x), kernels, arena)
    used = arena.num_bytes
    assert used <= 10 * 64  # of 150 results of 48 bytes
    record(lambda: deep(x), kernels, arena)
    assert arena.num_bytes == used


@torch.inference_mode()
def test_an_index_out_of_range_raises_in_a_replay(kernels: CpuKernels) -> None:
    index = torch.tensor([1, 2])
    graph, rows = record(lambda: F.embedding(index, SQUARE), kernels)
    assert torch.equal(rows, SQUARE[1:3])
    index[0] = len(SQUARE)
    with pytest.raises(IndexError):
        graph.replay()


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "a number is read": lambda x: x * x.sum().item(),
    "a condition is read": lambda x: x if x.sum() > 0 else -x,
    "indices are searched": lambda x: x.nonzero(),
    "a mask chooses": lambda x: x[x > 0],
    "chance": lambda x: torch.bernoulli(x.sigmoid()),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "a tensor grows": lambda x: x.clone().resize_(100, 100),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.inference_mode()
def test_operations_that_depend_on_more_than_shapes_are_refused(
    kernels: CpuKernels, name: str
) -> None:
    with pytest.raises(NotRepeatableError):
        record(lambda: REFUSED[name](values(0)[0]), kernels)


@torch.inference_mode()
def test_tensors_that_only_the_program_holds_are_kept(kernels: CpuKernels) -> None:
    x, _ = values(0)

    def program() -> Tensor:
        weight = torch.tensor([1.0, 2.0, 3.0, 4.0])  # after recording, only the graph refers to it
        return kernels.rms_norm(x, weight, 1e-5)

    graph, result = record(program, kernels)
    expected = result.clone()
    gc.collect()
    others = [torch.full((4,), 7.0) for _ in range(100)]
    graph.replay()
    assert torch.equal(result, expected)
    del others


def test_a_kernel_without_memory_raises_in_a_program(kernels: CpuKernels) -> None:
    calls: list[Call] = []
    x, packed = torch.ones(1, 4), kernels.pack_weight(SQUARE)
    with listening(calls.append):
        y = kernels.linear(x, packed, None, 4)
    (call,) = calls
    endless = (*call.arguments[:6], 2**50, *call.arguments[7:])  # more scratch memory than there is
    with pytest.raises(MemoryError, match="linear"):
        call.kernel(*endless)
    with pytest.raises(MemoryError):
        kernels.program([call, Call(call.kernel, endless)]).run()
    assert torch.equal(y, kernels.linear(x, packed, None, 4))


def test_calls_are_reported_only_while_a_listener_is_set(kernels: CpuKernels) -> None:
    calls: list[Call] = []
    with listening(calls.append):
        kernels.rms_norm(KEPT, WEIGHT, 1e-5)
    kernels.rms_norm(KEPT, WEIGHT, 1e-5)
    assert len(calls) == 1
