"""The GPU kernels against the reference attention: on a GPU, otherwise in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from engine.attention.kv_cache import KVCache, LayerShape
from engine.attention.linear_bias import LinearBias
from engine.attention.paged import AttentionBackend, ReferenceAttention
from engine.engine import Engine
from engine.model.loaded import LoadedModel
from engine.model.model_runner import ModelRunner
from engine.model.prepare import _triton_attention
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from tests.engine.fakes import run, token_ids
from tests.engine.on_device import DEVICE

triton = pytest.importorskip("triton")

from engine.kernels import triton_attention  # noqa: E402  (needs Triton)
from engine.kernels.triton_attention import TritonAttention  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.usefixtures("one_thread", "dots_of_bfloat16"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What varies between attention calls. A sequence is (query tokens, context)."""

    sequences: list[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    sliding_window: int | None = None
    chunk_size: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    bias_scale: float | None = None  # of a rounded linear bias; 0 for an exact one
    seed: int = 0


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes splits so small that short contexts have several, and so few that some are larger.

    There are half as many programs, so that each has two splits.
    """
    monkeypatch.setattr(triton_attention, "_LEAST_SPLIT", 16)
    monkeypatch.setattr(triton_attention, "_FEWEST_SPLITS", 4)
    monkeypatch.setattr(triton_attention, "_MOST_SPLITS", 4)
    monkeypatch.setattr(triton_attention, "_num_units", lambda _device: 1)
    monkeypatch.setattr(triton_attention, "_LEAST_PROGRAMS", 2)


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of an attention call."""

    query: Tensor
    caches: tuple[Tensor, Tensor]
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    sinks: Tensor | None
    linear_bias: LinearBias | None = None


def make_batch(case: Case) -> Batch:
    """Random queries, and random caches whose unused slots hold NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    (num_heads, kv_heads), size = case.heads, case.block_size
    counts = [-(-context // size) for _, context in case.sequences]
    layers = {0: LayerShape(kv_heads, case.key_dim, case.value_dim)}
    cache = KVCache(layers, sum(counts) + 1, size, case.cache_dtype or case.dtype, DEVICE)
    order = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
    tables = torch.zeros(len(counts), max(*counts, 1), dtype=torch.int32)
    caches = cache.layers[0]
    for states in caches:
        states.fill_(float("nan"))
    for row, (count, (_, context)) in enumerate(zip(counts, case.sequences, strict=True)):
        tables[row, :count] = torch.tensor([next(order) for _ in range(count)])
        positions = torch.arange(context)
        slots = tables[row][positions // size].long() * size + positions % size
        key = torch.randn(context, kv_heads, case.key_dim, generator=generator)
        value = torch.randn(context, kv_heads, case.value_dim, generator=generator)
        ReferenceAttention().write_kv(
            *(x.to(DEVICE, case.dtype) for x in (key, value)), *caches, slots.to(DEVICE)
        )
    starts = torch.tensor([0, *(queries for queries, _ in case.sequences)]).cumsum(0).int()
    # Head-major, as in transformers before the transpose: other strides than those of [T, H, D].
    query = torch.randn(num_heads, int(starts[-1]), case.key_dim, generator=generator)
    sinks = torch.randn(num_heads, generator=generator)
    slopes = torch.rand(num_heads, generator=generator).bfloat16().float()
    return Batch(
        query.to(DEVICE, case.dtype).transpose(0, 1),
        caches,
        tables.to(DEVICE),
        starts.to(DEVICE),
        torch.tensor([context for _, context in case.sequences]).int().to(DEVICE),
        sinks.to(DEVICE, case.dtype) if case.has_sinks else None,
        None if case.bias_scale is None else LinearBias(slopes.to(DEVICE), case.bias_scale or None),
    )


def attend(case: Case, batch: Batch, backend: AttentionBackend) -> Tensor:
    return backend.paged_attention(
        batch.query,
        *batch.caches,
        batch.block_tables,
        batch.query_start_loc,
        batch.context_lens,
        case.key_dim**-0.5,
        sliding_window=case.sliding_window,
        chunk_size=case.chunk_size,
        softcap=case.softcap,
        sinks=batch.sinks,
        linear_bias=batch.linear_bias,
    )


def check(case: Case) -> None:
    batch, tolerance = make_batch(case), TOLERANCE[case.dtype]
    torch.testing.assert_close(
        attend(case, batch, TritonAttention()),
        attend(case, batch, ReferenceAttention()),
        atol=tolerance,
        rtol=tolerance,
    )


DECODE = [(1, 1), (1, 9), (1, 80)]
MIXED = [(1, 33), (3, 40), (40, 40), (21, 70), (1, 1)]
OPTIONS = [
    Case(sequences=[]),
    Case(sequences=[], heads=(6, 2), key_dim=80, value_dim=80, sliding_window=20),
    Case(sequences=[], chunk_size=24, heads=(4, 2), key_dim=16, value_dim=16),
    Case(sequences=[], heads=(5, 1), key_dim=96, value_dim=64, softcap=3.0, block_size=32),
    Case(sequences=[], heads=(2, 2), key_dim=64, has_sinks=True, block_size=128, sliding_window=7),
    Case(sequences=[], dtype=torch.float16, has_sinks=True, softcap=20.0, block_size=64),
    Case(sequences=[], heads=(4, 4), bias_scale=0.0, sliding_window=50, key_dim=8),
    Case(sequences=[], heads=(6, 1), bias_scale=0.3, dtype=torch.float16),
    Case(sequences=[], dtype=torch.bfloat16, key_dim=128, value_dim=128, heads=(8, 2)),
]


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
def test_equals_the_reference(sequences: list[tuple[int, int]], options: Case) -> None:
    check(replace(options, sequences=sequences))


@pytest.mark.parametrize("head_dim", [192, 256])
def test_wide_heads_equal_the_reference(head_dim: int) -> None:
    check(Case(sequences=[(1, 20), (20, 30)], key_dim=head_dim, value_dim=head_dim, heads=(2, 1)))


@pytest.mark.parametrize("heads", [(2, 1), (34, 1), (36, 2)])
def test_heads_as_wide_as_latents_equal_the_reference(heads: tuple[int, int]) -> None:
    """With so many query heads, several programs share a key head."""
    check(Case(sequences=[(1, 20), (20, 30)], key_dim=320, value_dim=320, heads=heads))


def test_a_context_of_thousands_equals_the_reference() -> None:
    check(Case(sequences=[(1, 3000), (1, 700)], heads=(2, 1)))


@pytest.mark.parametrize("bias_scale", [0.0, 0.3])
def test_a_bias_in_long_texts_equals_the_reference(bias_scale: float) -> None:
    check(Case(sequences=[(1, 900), (34, 600)], heads=(3, 1), bias_scale=bias_scale))


@st.composite
def lengths(draw: st.DrawFn) -> tuple[int, int]:
    """Decoding, with draft tokens or without, whole prompts and chunks of prompts."""
    queries = draw(st.one_of(st.just(1), st.integers(1, 9), st.integers(1, 60)))
    return queries, queries + draw(st.one_of(st.just(0), st.integers(0, 90)))


@pytest.mark.usefixtures("small_splits")
@settings(max_examples=8)
@given(
    st.builds(
        Case,
        sequences=st.lists(lengths(), min_size=1, max_size=3),
        heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (14, 2), (17, 1)]),
        key_dim=st.sampled_from([8, 16, 40]),
        value_dim=st.sampled_from([16, 24]),
        block_size=st.sampled_from([4, 16, 32]),
        dtype=st.sampled_from([torch.float32, torch.float16]),
        sliding_window=st.none() | st.integers(1, 100),
        chunk_size=st.none() | st.integers(1, 100),
        softcap=st.none() | st.just(2.0),
        has_sinks=st.booleans(),
        bias_scale=st.none() | st.sampled_from([0.0, 0.3]),
        seed=st.integers(0, 2**16),
    )
)
def test_any_batch_equals_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("sequences", [[(1, 40), (1, 0)], [(1, 40), (9, 9), (1, 0), (20, 0)]])
def test_padding_gives_zeros(sequences: list[tuple[int, int]], has_sinks: bool) -> None:
    case = Case(sequences=sequences, has_sinks=has_sinks)
    rows = attend(case, make_batch(case), TritonAttention()).split([n for n, _ in sequences])
    assert all(torch.isfinite(row).all() for row in rows)
    assert [bool(row.any()) for row in rows] == [context > 0 for _, context in sequences]


@pytest.mark.usefixtures("small_splits")
def test_padding_rows_give_zeros_and_sequences_may_have_no_tokens() -> None:
    case = Case(sequences=[(1, 40), (3, 50), (0, 0), (0, 0)])
    batch = make_batch(case)
    expected = attend(case, batch, ReferenceAttention())
    more = torch.full_like(batch.query[:2], float("nan"))
    output = attend(case, replace(batch, query=torch.cat([batch.query, more])), TritonAttention())
    torch.testing.assert_close(output[:4], expected, atol=2e-5, rtol=2e-5)
    assert not output[4:].any()


def test_nan_of_one_row_stays_in_it() -> None:
    backend, shape = TritonAttention(), LayerShape(1, 16, 16)
    caches = KVCache({0: shape}, 3, 16, torch.float32, DEVICE).layers[0]
    query = torch.ones(2, 2, 16, device=DEVICE)
    query[0] = float("nan")
    numbers = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 1, 2], [5, 6])]
    tables = torch.tensor([[1], [2]], dtype=torch.int32, device=DEVICE)
    output = backend.paged_attention(query, *caches, tables, *numbers, 1.0)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


@pytest.mark.usefixtures("small_splits")
def test_a_row_does_not_depend_on_its_batch() -> None:
    case = Case(sequences=[(1, 70), (1, 100), (1, 9)])
    batch = make_batch(case)
    alone = Batch(
        batch.query[:1],
        batch.caches,
        batch.block_tables[:1, :5],
        batch.query_start_loc[:2],
        batch.context_lens[:1],
        None,
    )
    together = attend(case, batch, TritonAttention())
    assert torch.equal(together[:1], attend(case, alone, TritonAttention()))


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
def test_a_result_does_not_depend_on_the_size_of_the_gpu(
    sequences: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(sequences=sequences)
    batch, outputs = make_batch(case), []
    for programs in (1, 2, 100):
        monkeypatch.setattr(triton_attention, "_LEAST_PROGRAMS", programs)
        outputs.append(attend(case, batch, TritonAttention()))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_more_sequences_than_one_search_step_equal_the_reference() -> None:
    sequences = [(1, 1)] * 255 + [(33, 33), (0, 0), (40, 44), (1, 3)]
    check(Case(sequences=sequences, heads=(1, 1)))


@pytest.mark.parametrize(
    ("heads", "splits"),
    [((32, 8), 32), ((28, 4), 64), ((16, 2), 128), ((8, 1), 128), ((71, 1), 32), ((32, 32), 32)],
)
def test_a_model_with_fewer_key_heads_has_more_splits(heads: tuple[int, int], splits: int) -> None:
    num_heads, kv_heads = heads
    cache = torch.zeros(1, kv_heads, 16, 128).transpose(1, 2)
    for num_tokens in (2, 70):  # in decode steps and in others
        numbers = torch.zeros(3, dtype=torch.int32)
        query = torch.zeros(num_tokens, num_heads, 128)
        call = triton_attention._Call(
            query, cache, cache, numbers[:2, None], numbers, numbers[:2], 1.0, 0, 0, 0.0, None
        )
        assert call.max_splits == splits


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_caches_are_read_as_the_reference_reads_them(
    dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    check(Case(sequences=[(1, 40), (20, 20)], dtype=dtype, cache_dtype=cache_dtype))


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIG = EngineConfig(model_id="", socket_path=Path())
PROMPTS = [tuple(range(3, 12)), (7, 5), tuple(range(20, 44, 2))]


def load() -> LoadedModel:
    """A random model, the same at every call; scaled up, so that it does not repeat one token."""
    torch.manual_seed(0)
    config = Gemma2Config(**TINY, head_dim=16, sliding_window=9)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return attach_paged_attention(model.to(DEVICE), DEVICE, torch.float32)


def greedy_tokens(loaded: LoadedModel, backend: AttentionBackend) -> list[list[int]]:
    """The engine's continuations of the prompts, in steps that mix prompts and decoding."""
    cache = KVCache(loaded.layers, 20, 16, torch.float32, DEVICE)
    scheduler = Scheduler(BlockManager(20, 16), max_step_tokens=10, max_num_seqs=8)
    engine = Engine(ModelRunner(loaded, cache, backend).forward, scheduler, DEVICE)
    requests = [
        Request(request_id=str(index), prompt_token_ids=prompt, max_new_tokens=4)
        for index, prompt in enumerate(PROMPTS)
    ]
    outputs = run(engine, *requests)
    return [token_ids(outputs[request.request_id]) for request in requests]


def test_a_model_gives_the_tokens_of_the_reference() -> None:
    loaded = load()
    expected = greedy_tokens(loaded, ReferenceAttention())
    assert len({token_id for tokens in expected for token_id in tokens}) > 3, "tokens differ"
    backend = _triton_attention(CONFIG, loaded, torch.float32)
    assert isinstance(backend, TritonAttention), "the backend passes its check"
    assert defers_rotation(loaded)
    assert greedy_tokens(loaded, backend) == expected


def defers_rotation(loaded: LoadedModel) -> bool:
    """Whether the rotary embedding of the layers is deferred to attention."""
    return any("forward" in vars(module) for module in loaded.model.modules())
