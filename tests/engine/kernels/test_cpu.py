"""The C kernels against plain torch: attention over a paged cache, KV scatter, row-wise kernels."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypedDict, Unpack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.attention.kv_cache import KVCache, LayerShape
from engine.attention.linear_bias import LinearBias
from engine.kernels.cpu import Activation, CpuKernels
from tests.engine.native import needs_compiler, threads

relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True, slots=True)
class Batch:
    """A mixed step: per sequence (queries, context), with its cache filled."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor


def make_caches(
    shape: tuple[int, int, int, int], *, head_major: bool = True
) -> tuple[Tensor, Tensor]:
    """Key and value cache [num_blocks, block_size, num_kv_heads, head_size].

    In memory they are as `KVCache` has them, or else contiguous.
    """
    if not head_major:
        return torch.empty(shape), torch.empty(shape)
    num_blocks, block_size, num_kv_heads, head_size = shape
    layers = {0: LayerShape(num_kv_heads, head_size, head_size)}
    return KVCache(layers, num_blocks, block_size, torch.float32, torch.device("cpu")).layers[0]


def make_batch(
    sequences: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    *,
    seed: int = 0,
    head_major: bool = True,
) -> Batch:
    """Random cache contents in scattered blocks; unused slots hold NaN."""
    torch.manual_seed(seed)
    counts = [-(-context // block_size) for _, context in sequences]
    num_blocks = sum(counts) + 2
    shape = (num_blocks, block_size, num_kv_heads, head_size)
    key_cache, value_cache = make_caches(shape, head_major=head_major)
    key_cache.fill_(torch.nan)
    value_cache.fill_(torch.nan)
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    block_tables = torch.zeros(len(sequences), max(counts), dtype=torch.int32)
    for row, ((_, context), count) in enumerate(zip(sequences, counts, strict=True)):
        blocks, free = free[:count], free[count:]
        block_tables[row, :count] = torch.tensor(blocks)
        position = torch.arange(context)
        block = torch.tensor(blocks)[position // block_size]
        for cache in (key_cache, value_cache):
            cache[block, position % block_size] = torch.randn(context, num_kv_heads, head_size)
    queries = torch.tensor([0, *(queries for queries, _ in sequences)])
    return Batch(
        torch.randn(int(queries.sum()), num_heads, head_size),
        key_cache,
        value_cache,
        block_tables,
        queries.cumsum(0).int(),
        torch.tensor([context for _, context in sequences]).int(),
    )


class Options(TypedDict, total=False):
    """Keyword arguments of both implementations."""

    sliding_window: int | None
    chunk_size: int | None
    softcap: float | None
    sinks: Tensor | None
    linear_bias: LinearBias | None


def reference_attention(
    batch: Batch,
    scale: float,
    *,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    linear_bias: LinearBias | None = None,
) -> Tensor:
    """Attention in float64, one sequence after the other, with all scores in memory."""
    out = torch.empty_like(batch.query)
    group = batch.query.shape[1] // batch.key_cache.shape[2]
    starts = batch.query_start_loc.tolist()
    for row, context in enumerate(batch.context_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        blocks = batch.block_tables[row].long()
        key, value = (
            cache[blocks].flatten(0, 1)[:context].double().repeat_interleave(group, 1)
            for cache in (batch.key_cache, batch.value_cache)
        )
        logits = torch.einsum("qhd,khd->hqk", batch.query[start:end].double(), key) * scale
        position = torch.arange(context - (end - start), context)[:, None]
        if linear_bias is not None:
            logits += linear_bias.between(position[:, 0], torch.arange(context))
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        seen = torch.arange(context)[None] <= position
        if sliding_window:
            seen &= torch.arange(context)[None] > position - sliding_window
        if chunk_size:
            seen &= torch.arange(context)[None] // chunk_size == position // chunk_size
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            column = sinks.double()[:, None, None].expand(-1, end - start, 1)
            logits = torch.cat([logits, column], dim=-1)
        weights = logits.softmax(-1)[..., :context]
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, value).float()
    return out


def run(kernels: CpuKernels, batch: Batch, scale: float, **options: Unpack[Options]) -> Tensor:
    return kernels.paged_attention(
        batch.query,
        batch.key_cache,
        batch.value_cache,
        batch.block_tables,
        batch.query_start_loc,
        batch.context_lens,
        scale,
        **options,
    )


@st.composite
def sequence_lengths(draw: st.DrawFn) -> tuple[int, int]:
    """Decode, whole prompts, and chunks after a prefix."""
    queries = draw(st.one_of(st.just(1), st.integers(1, 12), st.integers(1, 150)))
    return queries, queries + draw(st.one_of(st.just(0), st.integers(0, 300)))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """What varies between models."""

    heads: tuple[int, int]
    head_size: int
    sliding_window: int | None
    chunk_size: int | None
    softcap: float | None
    has_sinks: bool
    bias_scale: float | None  # of a rounded bias; 0 for an exact one

    def options(self) -> Options:
        """With random numbers for each head."""
        options: Options = {
            "sliding_window": self.sliding_window,
            "chunk_size": self.chunk_size,
            "softcap": self.softcap,
        }
        if self.has_sinks:
            options["sinks"] = torch.randn(self.heads[0])
        if self.bias_scale is not None:
            slopes = torch.rand(self.heads[0]).bfloat16().float()
            options["linear_bias"] = LinearBias(slopes, self.bias_scale or None)
        return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(AttentionKind):
    """What varies between attention calls."""

    sequences: list[tuple[int, int]]
    block_size: int
    head_major: bool
    seed: int


attention_cases = st.builds(
    Case,
    sequences=st.lists(sequence_lengths(), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (8, 2), (5, 1), (14, 2), (16, 1)]),
    head_size=st.sampled_from([8, 20, 32, 64, 72, 80, 96, 128, 256, 576]),
    block_size=st.sampled_from([8, 16, 32]),
    sliding_window=st.none() | st.integers(1, 200),
    chunk_size=st.none() | st.integers(1, 200),
    softcap=st.none() | st.sampled_from([2.0, 30.0]),
    has_sinks=st.booleans(),
    bias_scale=st.none() | st.sampled_from([0.0, 0.3]),
    head_major=st.booleans(),
    seed=st.integers(0, 2**16),
)


def check_attention(kernels: CpuKernels, case: Case) -> None:
    batch = make_batch(
        case.sequences,
        *case.heads,
        case.head_size,
        case.block_size,
        seed=case.seed,
        head_major=case.head_major,
    )
    options = case.options()
    scale = case.head_size**-0.5
    expected = reference_attention(batch, scale, **options)
    torch.testing.assert_close(run(kernels, batch, scale, **options), expected, atol=1e-5, rtol=0)


@needs_compiler
@relaxed
@given(case=attention_cases)
def test_attention_equals_reference_on_mixed_batches(kernels: CpuKernels, case: Case) -> None:
    check_attention(kernels, case)


@needs_compiler
@settings(relaxed, max_examples=25)
@given(case=attention_cases)
def test_attention_equals_reference_with_narrow_vectors(
    narrow_kernels: CpuKernels, case: Case
) -> None:
    check_attention(narrow_kernels, case)


@needs_compiler
@pytest.mark.parametrize("sequences", [[(1, 3000)], [(3, 5000)], [(1, 513), (2, 2050), (1, 1)]])
@pytest.mark.parametrize("sliding_window", [None, 700])
def test_attention_equals_reference_where_the_context_is_split(
    kernels: CpuKernels, sequences: list[tuple[int, int]], sliding_window: int | None
) -> None:
    batch = make_batch(sequences, 4, 2, 64, 16)
    sinks = torch.randn(4)
    expected = reference_attention(batch, 0.2, sliding_window=sliding_window, sinks=sinks)
    actual = run(kernels, batch, 0.2, sliding_window=sliding_window, sinks=sinks)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@needs_compiler
@pytest.mark.parametrize("rounded_scale", [None, 0.25])
def test_a_bias_in_long_texts_equals_the_reference(
    kernels: CpuKernels, rounded_scale: float | None
) -> None:
    batch = make_batch([(1, 3000), (70, 1100)], 6, 2, 32, 16)
    bias = LinearBias(
        torch.tensor([0.84, 0.5, 0.03, 0.004, 0.7, 0.25]).bfloat16().float(), rounded_scale
    )
    expected = reference_attention(batch, 0.2, linear_bias=bias)
    actual = run(kernels, batch, 0.2, linear_bias=bias)
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=0)
    without = run(kernels, batch, 0.2)
    assert ((actual - without).abs().amax(-1) > 0.01).all(), "each head of each token has its bias"


@needs_compiler
def test_attention_keeps_precision_with_large_logits(kernels: CpuKernels) -> None:
    batch = make_batch([(1, 200), (70, 130)], 4, 2, 64, 16)
    expected = reference_attention(batch, 8.0)
    torch.testing.assert_close(run(kernels, batch, 8.0), expected, atol=2e-4, rtol=0)


@needs_compiler
@pytest.mark.parametrize("poisoned", ["query", "key", "value"])
def test_nan_of_one_sequence_stays_in_its_rows(kernels: CpuKernels, poisoned: str) -> None:
    batch = make_batch([(1, 90), (1, 77), (40, 60), (1, 600)], 6, 2, 64, 16)
    clean = run(kernels, batch, 0.125)
    if poisoned == "query":
        batch.query[1] = torch.nan
    else:
        cache = batch.key_cache if poisoned == "key" else batch.value_cache
        cache[int(batch.block_tables[1, 0]), 3] = torch.nan
    dirty = run(kernels, batch, 0.125)
    others = torch.arange(len(dirty)) != 1
    assert torch.equal(dirty[others], clean[others])
    assert dirty[1].isnan().any()


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_attention_of_a_sequence_depends_on_nothing_else(
    kernels: CpuKernels, num_threads: int
) -> None:
    batch = make_batch([(1, 1300), (50, 170), (1, 40)], 6, 2, 64, 16)
    together = run(kernels, batch, 0.125)
    with threads(num_threads):
        starts = batch.query_start_loc.tolist()
        for row, (start, end) in enumerate(pairwise(starts)):
            alone = kernels.paged_attention(
                batch.query[start:end],
                batch.key_cache,
                batch.value_cache,
                batch.block_tables[row : row + 1],
                torch.tensor([0, end - start]).int(),
                batch.context_lens[row : row + 1],
                0.125,
            )
            assert torch.equal(alone, together[start:end])


@needs_compiler
def test_attention_reads_strided_queries_and_zeroes_rows_without_context(
    kernels: CpuKernels,
) -> None:
    batch = make_batch([(3, 9), (2, 30)], 4, 2, 32, 8)
    expected = run(kernels, batch, 0.2)
    fused = torch.randn(5, 12, 32)
    fused[:, 4:8] = batch.query
    batch.context_lens[0] = 0
    actual = kernels.paged_attention(
        fused[:, 4:8],
        batch.key_cache,
        batch.value_cache,
        batch.block_tables,
        batch.query_start_loc,
        batch.context_lens,
        0.2,
    )
    assert torch.equal(actual[3:], expected[3:])
    assert not actual[:3].any()


@needs_compiler
def test_attention_refuses_what_it_cannot_read(kernels: CpuKernels) -> None:
    batch = make_batch([(1, 4)], 2, 1, 16, 8)
    wrong = Batch(
        batch.query.double(),
        batch.key_cache,
        batch.value_cache,
        batch.block_tables,
        batch.query_start_loc,
        batch.context_lens,
    )
    with pytest.raises(ValueError, match="fp32"):
        run(kernels, wrong, 1.0)
    with pytest.raises(ValueError, match="one slope per query head"):
        run(kernels, batch, 1.0, linear_bias=LinearBias(torch.ones(3)))
    large = make_batch([(1, 4)], 1, 1, kernels.max_head_size + 8, 8)
    with pytest.raises(ValueError, match="head size"):
        run(kernels, large, 1.0)


@needs_compiler
@relaxed
@given(
    num_tokens=st.integers(0, 80),
    num_kv_heads=st.integers(1, 4),
    head_size=st.sampled_from([4, 20, 64, 256]),
    block_size=st.sampled_from([1, 8, 16]),
    head_major=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_write_kv_fills_exactly_its_slots(
    kernels: CpuKernels,
    num_tokens: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    head_major: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_blocks = 80 // block_size + 3
    shape = (num_blocks, block_size, num_kv_heads, head_size)
    caches = make_caches(shape, head_major=head_major)
    expected = [torch.randn(shape) for _ in caches]
    for cache, content in zip(caches, expected, strict=True):
        cache.copy_(content)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[::7] = -1
    rows = torch.randn(num_tokens, 3, num_kv_heads, head_size)
    for content, new in zip(expected, (rows[:, 0], rows[:, 1]), strict=True):
        kept = slots >= 0
        content[slots[kept] // block_size, slots[kept] % block_size] = new[kept]
    kernels.write_kv(rows[:, 0], rows[:, 1], *caches, slots)
    for cache, content in zip(caches, expected, strict=True):
        assert torch.equal(cache, content)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 400])
@pytest.mark.parametrize("width", [1, 15, 40, 768])
def test_rms_norms_and_gates_equal_torch(kernels: CpuKernels, rows: int, width: int) -> None:
    torch.manual_seed(rows * width)
    x, weight = torch.randn(rows, width), torch.randn(width)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    for offset in (0.0, 1.0):
        y = kernels.rms_norm(x, weight, 1e-6, weight_offset=offset)
        expected = (exact * (weight + offset)).float()
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    gate, up = (torch.randn(rows, 2 * width) * 40).chunk(2, dim=-1)
    gate[0, 0] = -300.0
    expected = (nn.functional.silu(gate.double()) * up.double()).float()
    torch.testing.assert_close(kernels.silu_and_mul(gate, up), expected, atol=1e-5, rtol=1e-5)
    expected = (nn.functional.gelu(gate.double(), approximate="tanh") * up.double()).float()
    torch.testing.assert_close(kernels.gelu_and_mul(gate, up), expected, atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("activation", Activation)
def test_activations_equal_torch(kernels: CpuKernels, activation: Activation) -> None:
    torch.manual_seed(activation)
    function = {
        Activation.SIGMOID: torch.sigmoid,
        Activation.SILU: nn.functional.silu,
        Activation.GELU: nn.functional.gelu,
        Activation.GELU_TANH: partial(nn.functional.gelu, approximate="tanh"),
        Activation.SOFTPLUS: nn.functional.softplus,
    }[activation]
    for x in (torch.randn(400, 515), torch.linspace(-100, 100, 9001), torch.zeros(0, 3)):
        y = kernels.activate(x, activation)
        torch.testing.assert_close(y, function(x.double()).float(), atol=1e-6, rtol=1e-6)
    special = torch.tensor([-math.inf, math.inf, math.nan])
    if activation is Activation.SIGMOID:
        found = kernels.activate(special, activation)
        torch.testing.assert_close(found, torch.tensor([0.0, 1.0, math.nan]), equal_nan=True)
    assert kernels.activate(special, activation)[2].isnan()
    assert kernels.activate(torch.ones(4, 6).t(), activation).shape == (6, 4)
    with pytest.raises(ValueError, match="float32"):
        kernels.activate(torch.zeros(3).double(), activation)


@needs_compiler
def test_attention_takes_empty_steps_and_many_query_heads_per_key_head(kernels: CpuKernels) -> None:
    batch = make_batch([(1, 40), (3, 20)], 130, 1, 16, 8)
    expected = reference_attention(batch, 0.25)
    torch.testing.assert_close(run(kernels, batch, 0.25), expected, atol=1e-5, rtol=0)
    empty = Batch(
        batch.query[:0],
        batch.key_cache,
        batch.value_cache,
        batch.block_tables[:0],
        batch.query_start_loc[:1],
        batch.context_lens[:0],
    )
    assert run(kernels, empty, 0.25).shape == (0, 130, 16)
