"""The C kernels against plain torch: attention over a paged cache, KV scatter, packed linear."""

import ctypes
import logging
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypedDict, Unpack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.kernels import build
from engine.kernels.cpu import CpuKernels, empty_kv_cache, load
from engine.kernels.packed_linear import PackedLinear, pack_model
from tests.engine.native import threads
from tests.paths import REPOSITORY


def _compiler_exists() -> bool:
    try:
        build.find_compiler()
    except build.BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _compiler_exists(), reason="no C compiler")
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    loaded = load()
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def narrow_kernels(kernels: CpuKernels) -> CpuKernels:
    """The same source for a smaller instruction set: other vector widths and tiles."""
    if kernels.panel_width != 32:  # two AVX-512 vectors
        pytest.skip("this machine has no wider vectors to leave out")
    return CpuKernels(build.build_library(["-mno-avx512f"]))


@dataclass(frozen=True, slots=True)
class Batch:
    """A mixed step: per sequence (queries, context), with its cache filled."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor


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
    """Random cache contents in scattered blocks; every slot that is not used holds NaN."""
    torch.manual_seed(seed)
    counts = [-(-context // block_size) for _, context in sequences]
    num_blocks = sum(counts) + 2
    shape = (num_blocks, block_size, num_kv_heads, head_size)
    if head_major:
        key_cache, value_cache = empty_kv_cache(*shape)
    else:
        key_cache, value_cache = torch.empty(shape), torch.empty(shape)
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
    softcap: float | None
    sinks: Tensor | None


def reference_attention(
    batch: Batch,
    scale: float,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Sequence by sequence in float64, with all scores laid out."""
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
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        position = torch.arange(context - (end - start), context)[:, None]
        seen = torch.arange(context)[None] <= position
        if sliding_window:
            seen &= torch.arange(context)[None] > position - sliding_window
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
class Case:
    """What varies between attention calls."""

    sequences: list[tuple[int, int]]
    heads: tuple[int, int]
    head_size: int
    block_size: int
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool
    head_major: bool
    seed: int


attention_cases = st.builds(
    Case,
    sequences=st.lists(sequence_lengths(), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (8, 2), (5, 1), (14, 2), (16, 1)]),
    head_size=st.sampled_from([8, 20, 32, 64, 72, 80, 96, 128, 256]),
    block_size=st.sampled_from([8, 16, 32]),
    sliding_window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.sampled_from([2.0, 30.0]),
    has_sinks=st.booleans(),
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
    options: Options = {"sliding_window": case.sliding_window, "softcap": case.softcap}
    if case.has_sinks:
        options["sinks"] = torch.randn(case.heads[0])
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
def test_attention_keeps_precision_with_large_logits(kernels: CpuKernels) -> None:
    batch = make_batch([(1, 200), (70, 130)], 4, 2, 64, 16)
    expected = reference_attention(batch, 8.0)
    torch.testing.assert_close(run(kernels, batch, 8.0), expected, atol=2e-4, rtol=0)


@needs_compiler
@pytest.mark.parametrize("poisoned", ["query", "key", "value"])
def test_nan_of_one_sequence_stays_in_it_and_stays_visible(
    kernels: CpuKernels, poisoned: str
) -> None:
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
    caches = empty_kv_cache(*shape) if head_major else (torch.empty(shape), torch.empty(shape))
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


linear_cases = {
    "rows": st.one_of(st.integers(1, 32), st.integers(1, 300)),
    "in_features": st.one_of(st.integers(1, 70), st.integers(500, 1100)),
    "out_features": st.integers(1, 200),
    "has_bias": st.booleans(),
    "seed": st.integers(0, 2**16),
}


def check_linear(
    kernels: CpuKernels, rows: int, in_features: int, out_features: int, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=has_bias)
    packed = PackedLinear.from_linear(linear, kernels)
    x = torch.randn(rows, in_features)
    y = packed(x)
    exact = x.double() @ linear.weight.double().T
    if has_bias:
        exact += linear.bias
    torch.testing.assert_close(y, exact.float(), atol=1e-5, rtol=1e-5)
    row = seed % rows
    assert torch.equal(packed(x[row : row + 1]), y[row : row + 1])
    assert torch.equal(kernels.unpack_weight(packed.packed, out_features), linear.weight)


@needs_compiler
@relaxed
@given(**linear_cases)
def test_packed_linear_equals_linear_and_ignores_other_rows(
    kernels: CpuKernels, rows: int, in_features: int, out_features: int, has_bias: bool, seed: int
) -> None:
    check_linear(kernels, rows, in_features, out_features, has_bias, seed)


@needs_compiler
@settings(relaxed, max_examples=25)
@given(**linear_cases)
def test_packed_linear_equals_linear_with_narrow_vectors(
    narrow_kernels: CpuKernels,
    rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    seed: int,
) -> None:
    check_linear(narrow_kernels, rows, in_features, out_features, has_bias, seed)


@needs_compiler
def test_packed_linear_takes_any_leading_shape_and_more_rows_than_one_pass(
    kernels: CpuKernels,
) -> None:
    linear = nn.Linear(40, 24)
    packed = PackedLinear.from_linear(linear, kernels)
    for shape in ((40,), (2, 450, 40), (0, 40), (3, 1, 2, 40)):
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)
    transposed = torch.randn(40, 7).T
    torch.testing.assert_close(packed(transposed), linear(transposed), atol=1e-5, rtol=1e-5)


class _TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


@needs_compiler
@torch.inference_mode()
def test_pack_model_keeps_results_and_reports_the_copy_of_tied_weights(
    kernels: CpuKernels,
) -> None:
    model = _TiedModel()
    ids = torch.arange(50)
    expected = model(ids)
    report = pack_model(model, kernels)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    assert report.num_layers == 3
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]
    padded_head = -(-50 // kernels.panel_width) * kernels.panel_width * 32 * 4
    assert report.extra_bytes == padded_head
    assert report.packed_bytes == padded_head + 2 * 32 * 32 * 4


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 400])
@pytest.mark.parametrize("width", [1, 15, 40, 768])
def test_row_wise_pieces_equal_torch(kernels: CpuKernels, rows: int, width: int) -> None:
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


@needs_compiler
def test_empty_steps_and_wide_groups_are_fine(kernels: CpuKernels) -> None:
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


@needs_compiler
def test_kernels_share_torchs_openmp_runtime(kernels: CpuKernels) -> None:
    if build.find_openmp_runtime() is None:
        pytest.skip("torch brings no libgomp here")
    assert kernels.has_openmp
    mapped = {path for path in build._mapped_libraries() if path.name.startswith("libgomp")}
    assert len(mapped) == 1


@needs_compiler
def test_build_is_cached_in_a_private_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(build.build_library(["-O0"]), ctypes.CDLL)
    directory = tmp_path / "tokenwire"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [path.suffix for path in directory.iterdir()] == [".so"]
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    build.build_library(["-O0"])


@needs_compiler
def test_build_refuses_a_directory_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tokenwire").mkdir()
    (tmp_path / "tokenwire").chmod(0o777)
    with pytest.raises(build.BuildError, match="writable by other users"):
        build.build_library()


@needs_compiler
def test_build_without_a_shared_runtime_runs_on_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_openmp_runtime", lambda: None)
    with caplog.at_level(logging.WARNING):
        kernels = CpuKernels(build.build_library(["-O1"]))
    assert not kernels.has_openmp
    assert "one thread" in caplog.text
    check_linear(kernels, 5, 64, 70, True, 0)


def test_missing_compiler_gives_none_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    build.load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert build.load_library() is None
            assert build.load_library() is None
        assert caplog.text.count("no C compiler found") == 1
    finally:
        build.load_library.cache_clear()


def test_failing_compiler_gives_none_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho out of luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert build.load_library() is None
        assert "out of luck" in caplog.text
    finally:
        build.load_library.cache_clear()


def test_switch_turns_the_kernels_off() -> None:
    code = "from engine.kernels.cpu import load; print(load())"
    environment = {**os.environ, build.SWITCH: "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "None"
