"""A token's attention is the same, bit for bit, however its sequence is divided among steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu import Activation, CpuKernels
from tests.engine.kernels.test_cpu import AttentionKind, Batch, Options, make_batch
from tests.engine.native import TARGETS, kernels_for, needs_compiler, threads

pytestmark = needs_compiler


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(AttentionKind):
    """A sequence of `context` tokens, and the steps that compute it."""

    context: int
    cuts: list[int]
    num_threads: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    context = draw(st.integers(1, 200) | st.integers(450, 1200))
    middle = st.integers(1, context)
    near = st.sampled_from([63, 64, 65, 511, 512, 513, 1024]).map(lambda cut: min(cut, context))
    cuts = draw(st.lists(middle | near, max_size=5))
    first = draw(middle)  # from here on, some tokens come one by one, as in decoding
    cuts += range(first, min(first + draw(st.integers(0, 6)), context))
    return Case(
        context=context,
        cuts=sorted({0, *cuts, context}),
        heads=draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (8, 2), (5, 1), (16, 1)])),
        head_size=draw(st.sampled_from([8, 20, 64, 80, 128, 256])),
        sliding_window=draw(st.none() | st.integers(1, 700)),
        chunk_size=draw(st.none() | st.integers(1, 700)),
        softcap=draw(st.none() | st.just(30.0)),
        has_sinks=draw(st.booleans()),
        bias_scale=draw(st.none() | st.sampled_from([0.0, 0.3])),
        num_threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


def attend(
    kernels: CpuKernels, batch: Batch, rows: list[tuple[int, int]], options: Options
) -> Tensor:
    """Attention of a range of positions of each sequence; its later positions are not yet there."""
    starts = batch.query_start_loc.tolist()
    query = [
        batch.query[start + low : start + high]
        for start, (low, high) in zip(starts, rows, strict=False)
    ]
    counts = torch.tensor([0, *(high - low for low, high in rows)])
    return kernels.paged_attention(
        torch.cat(query),
        batch.key_cache,
        batch.value_cache,
        batch.block_tables[: len(rows)],
        counts.cumsum(0).int(),
        torch.tensor([high for _, high in rows]).int(),
        0.3,
        **options,
    )


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_attention_does_not_depend_on_the_division_into_steps(target: str, case: Case) -> None:
    kernels = kernels_for(target)
    lengths = [(case.context, case.context), (90, 90)]
    batch = make_batch(lengths, *case.heads, case.head_size, 16, seed=case.seed)
    options = case.options()
    whole = attend(kernels, batch, [(0, case.context)], options)
    with threads(case.num_threads):
        for number, (low, high) in enumerate(pairwise(case.cuts)):
            company = [(number % 80, 90)] if number % 2 else []
            part = attend(kernels, batch, [(low, high), *company], options)[: high - low]
            assert torch.equal(part, whole[low:high])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("context", [511, 512, 513, 1100])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (16, 1)])
def test_attention_of_every_last_token_is_that_of_the_prompt(
    target: str, context: int, heads: tuple[int, int]
) -> None:
    """One token, and few of them as drafts are, around the ends of runs and splits."""
    kernels = kernels_for(target)
    batch = make_batch([(context, context)], *heads, 64, 16)
    whole = attend(kernels, batch, [(0, context)], {})
    for end in {1, 63, 64, 65, 128, 510, 511, 512, 513, 577, 1024, 1025, context}:
        for count in (1, 2, 5):
            if count <= end <= context:
                part = attend(kernels, batch, [(end - count, end)], {})
                assert torch.equal(part, whole[end - count : end])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [1, 15, 40, 100, 2730])
def test_gates_of_a_row_do_not_depend_on_the_other_rows(target: str, width: int) -> None:
    kernels = kernels_for(target)
    gate, up = (torch.randn(100, 2 * width, generator=torch.Generator().manual_seed(width))).chunk(
        2, dim=-1
    )
    for gated in (kernels.silu_and_mul, kernels.gelu_and_mul):
        alone = torch.cat([gated(gate[row : row + 1], up[row : row + 1]) for row in range(100)])
        for num_threads in (1, 2, 3):
            with threads(num_threads):
                for rows in (3, 17, 100):
                    assert torch.equal(gated(gate[:rows], up[:rows]), alone[:rows])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("activation", Activation)
def test_the_activation_of_a_number_does_not_depend_on_its_place(
    target: str, activation: Activation
) -> None:
    kernels = kernels_for(target)
    x = torch.randn(10_007, generator=torch.Generator().manual_seed(1)) * 5
    alone = torch.cat([kernels.activate(number, activation) for number in x[:99].split(1)])
    for num_threads in (1, 2, 3):
        with threads(num_threads):
            whole = kernels.activate(x, activation)
            assert torch.equal(whole[:99], alone)
            for part in (slice(5, 47), slice(1, 10_000), slice(9_990, None)):
                assert torch.equal(kernels.activate(x[part], activation), whole[part])
