"""Recorded decode steps give the tokens of unrecorded ones.

Without a GPU, a replay here is a call with the same addresses, which computes what a CUDA graph
computes; a GPU only leaves out Python. The recorder for GPUs itself is tested with a fake of
`torch.cuda`, which says on which streams it records and what state it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from engine.attention.kv_cache import KVCache
from engine.attention.paged import AttentionBackend, ReferenceAttention
from engine.batch.model_input import ModelInput
from engine.batch.recorded_rows import TableWidths
from engine.computation.recorded_steps import missing_recordings
from engine.engine import Engine
from engine.executor import Forward
from engine.model.model_runner import ModelRunner
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request
from engine.replay.cuda_graphs import CudaGraphs, Replay, cuda_recorder
from engine.replay.shapes import Shape, decode_shapes, mixed_shapes, recorded_shapes
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from tests.engine.fakes import (
    CPU,
    VOCAB_SIZE,
    FakeModel,
    counting_logits,
    greedy_tokens,
    make_engine,
    next_logits,
    run,
    token_ids,
)
from tests.engine.loads import Arrival, arrivals, assert_same_answers, run_load
from tests.engine.on_device import DEVICE

MAX_BLOCKS = 8
SIZES = (1, 2, 5)


class Recorder:
    """Counts recordings and replays."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replays = 0

    def __call__(self, run: Callable[[], object]) -> Replay:
        self.num_recorded += 1
        run()

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


def graphs(
    model: Callable[[ModelInput], Tensor],
    recorder: Callable[[Callable[[], object]], Replay],
    *,
    with_drafts: bool = False,
    mixed: Sequence[Shape] = (),
) -> CudaGraphs:
    recorded = CudaGraphs(
        model,
        [*decode_shapes(SIZES, with_drafts=with_drafts), *mixed],
        widths=TableWidths(MAX_BLOCKS),
        vocab_size=VOCAB_SIZE,
        device=CPU,
    )
    recorded.record(recorder)
    return recorded


MIXED = (Shape(14, 3, 3), Shape(9, 3, 3))


@settings(max_examples=30)
@given(load=arrivals(), runs_ahead=st.booleans(), with_drafts=st.booleans())
def test_recorded_steps_with_prompts_change_no_token(
    load: list[Arrival], runs_ahead: bool, with_drafts: bool
) -> None:
    options = {"num_blocks": 16, "logits_of": cycling_logits}
    expected = run_load(make_engine(**options), load)
    engine = make_engine(
        **options,
        runs_ahead=runs_ahead,
        max_draft_tokens=3 * with_drafts,
        wrap=lambda model: graphs(padded(model), Recorder(), with_drafts=with_drafts, mixed=MIXED),
    )
    assert_same_answers(load, expected, run_load(engine, load))


@pytest.mark.parametrize(
    ("prompts", "num_replays"),
    [
        ([5], 3),  # of 9 tokens, and two decode steps
        ([9, 3], 3),  # of 14 tokens
        ([12, 3], 2),  # more tokens than any
        ([2, 2, 2, 2], 2),  # more sequences
    ],
    ids=str,
)
def test_a_step_with_prompts_is_replayed_if_a_recorded_one_has_room(
    prompts: list[int], num_replays: int
) -> None:
    recorder = Recorder()
    engine = make_engine(wrap=lambda model: graphs(padded(model), recorder, mixed=MIXED))
    asked = [
        Request(
            request_id=f"{number}",
            prompt_token_ids=tuple((3 * number + index) % 20 for index in range(size)),
            max_new_tokens=3,
        )
        for number, size in enumerate(prompts)
    ]
    outputs = run(engine, *asked)
    assert recorder.num_replays == num_replays
    for request in asked:
        tokens = token_ids(outputs[request.request_id])
        assert tokens == greedy_tokens(request.prompt_token_ids, 3)


def test_steps_with_prompts_are_no_larger_than_steps_can_be() -> None:
    shapes = mixed_shapes(max_step_tokens=300, max_num_seqs=20)
    assert shapes == [Shape(256, 20, 20), Shape(128, 20, 20), Shape(64, 20, 20)]
    assert mixed_shapes(max_step_tokens=63, max_num_seqs=20) == []
    assert all(
        shape.num_rows < shape.num_tokens
        for shape in mixed_shapes(max_step_tokens=2048, max_num_seqs=256)
    )


def test_without_sizes_nothing_is_recorded() -> None:
    config = EngineConfig(model_id="", socket_path=Path(), graph_sizes=(0,))
    assert recorded_shapes(config) == []
    config = replace(config, graph_sizes=(1, 8, 512), speculate=2)
    kinds = {shape.kind for shape in recorded_shapes(config)}
    assert kinds == {(True, True), (False, True), (False, False)}
    assert max(shape.num_seqs for shape in recorded_shapes(config)) == config.max_num_seqs


def padded(model: FakeModel) -> Callable[[ModelInput], Tensor]:
    """The same model, which also takes padding rows that belong to no sequence, as a real one."""

    def forward(batch: ModelInput) -> Tensor:
        owned = int(batch.attention.query_start_loc[-1])
        assert (batch.attention.slot_mapping[owned:] < 0).all(), "padding rows are stored"
        logits = torch.full((len(batch.logits_rows), VOCAB_SIZE), float("nan"))
        is_owned = batch.logits_rows < owned
        if owned:
            logits[is_owned] = model(replace(batch, logits_rows=batch.logits_rows[is_owned]))
        return logits

    return forward


@given(load=arrivals(), runs_ahead=st.booleans())
def test_tokens_are_those_without_recorded_steps(load: list[Arrival], runs_ahead: bool) -> None:
    recorder = Recorder()
    expected = run_load(make_engine(num_blocks=16), load)
    engine = make_engine(
        num_blocks=16, runs_ahead=runs_ahead, wrap=lambda model: graphs(model, recorder)
    )
    assert_same_answers(load, expected, run_load(engine, load))


def cycling_logits(token_ids: tuple[int, ...]) -> Tensor:
    """Float32 [VOCAB_SIZE]: most often after 0 comes 1, after 1 comes 2 and after 2 comes 0."""
    logits = next_logits(token_ids).clone()
    logits[(token_ids[-1] + 1) % 3] += 9.0
    return logits


@given(load=arrivals())
def test_draft_tokens_in_a_recorded_step_change_no_token(load: list[Arrival]) -> None:
    expected = run_load(make_engine(num_blocks=16, logits_of=cycling_logits), load)
    engine = make_engine(
        num_blocks=16,
        max_draft_tokens=3,
        logits_of=cycling_logits,
        wrap=lambda model: graphs(padded(model), Recorder(), with_drafts=True),
    )
    assert_same_answers(load, expected, run_load(engine, load))


@pytest.mark.parametrize(
    ("max_draft_tokens", "num_replays"), [(1, 2), (2, 2), (4, 2), (5, 0)], ids=str
)
def test_a_step_with_draft_tokens_uses_the_next_larger_size_if_there_is_one(
    max_draft_tokens: int, num_replays: int
) -> None:
    recorder = Recorder()
    engine = make_engine(
        max_draft_tokens=max_draft_tokens,
        logits_of=counting_logits,
        wrap=lambda model: graphs(padded(model), recorder, with_drafts=True),
    )
    prompt = (*range(10), *range(5))
    num_tokens = 1 + 2 * (
        1 + max_draft_tokens
    )  # of the prompt and two steps: all drafts are accepted
    request = Request(request_id="0", prompt_token_ids=prompt, max_new_tokens=num_tokens)
    assert token_ids(run(engine, request)["0"]) == [(5 + i) % 10 for i in range(num_tokens)]
    assert recorder.num_recorded == 2 * len(SIZES) - 1  # none of one token with drafts
    assert recorder.num_replays == num_replays


def requests(count: int, prompt_tokens: int = 3) -> list[Request]:
    return [
        Request(
            request_id=f"{number}",
            prompt_token_ids=tuple(range(number, number + prompt_tokens)),
            max_new_tokens=4,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(("num_requests", "num_replays"), [(1, 3), (3, 3), (5, 3), (6, 0)], ids=str)
def test_a_batch_uses_the_next_larger_size_if_there_is_one(
    num_requests: int, num_replays: int
) -> None:
    recorder = Recorder()
    engine = make_engine(wrap=lambda model: graphs(model, recorder))
    outputs = run(engine, *requests(num_requests))
    assert recorder.num_recorded == len(SIZES)
    assert recorder.num_replays == num_replays  # the first of four tokens comes from the prompt
    for request in requests(num_requests):
        tokens = token_ids(outputs[request.request_id])
        assert tokens == greedy_tokens(request.prompt_token_ids, 4)


def test_logits_of_any_dtype_equal_those_of_an_unrecorded_step() -> None:
    def coarse(model: FakeModel) -> Callable[[ModelInput], Tensor]:
        return lambda batch: model(batch).bfloat16()

    (request,) = requests(1)
    expected = run(make_engine(wrap=coarse), request)
    recorder = Recorder()
    assert run(make_engine(wrap=lambda model: graphs(coarse(model), recorder)), request) == expected
    assert recorder.num_replays == 3


def test_a_context_too_long_for_recordings_is_not_replayed() -> None:
    recorder = Recorder()
    engine = make_engine(wrap=lambda model: graphs(model, recorder))
    (request,) = requests(1, prompt_tokens=4 * MAX_BLOCKS - 2)
    tokens = token_ids(run(engine, request)["0"])
    assert tokens == greedy_tokens(request.prompt_token_ids, 4)
    assert recorder.num_replays == 2


def test_a_model_that_cannot_be_recorded_runs_unrecorded() -> None:
    def refuses(_: Callable[[], object]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    def wrap(model: FakeModel) -> CudaGraphs:
        recorded = CudaGraphs(
            model,
            decode_shapes(SIZES),
            widths=TableWidths(MAX_BLOCKS),
            vocab_size=VOCAB_SIZE,
            device=CPU,
        )
        recorded.record(refuses)
        return recorded

    (request,) = requests(1)
    assert token_ids(run(make_engine(wrap=wrap), request)["0"]) == greedy_tokens((0, 1, 2), 4)


def test_padding_rows_store_nothing() -> None:
    model = FakeModel(num_blocks=4)
    before = model.slots.clone()
    graphs(model, Recorder())
    assert torch.equal(model.slots, before)


TINY = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
)
REPETITIVE = [(3, 4, 5, 6, 3, 4, 5), (9, 8, 9, 8, 9), (7,) * 20]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.usefixtures("one_thread")
def test_a_model_on_our_kernels_gives_the_same_tokens_when_recorded() -> None:
    """On a GPU, otherwise in Triton's interpreter; unused slots of the cache hold NaN."""
    pytest.importorskip("triton")
    from engine.kernels.triton_attention import TritonAttention

    device = DEVICE
    recorder = Recorder()
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(TINY)
    loaded = attach_paged_attention(model.to(device).eval(), device, torch.float32)

    def answers(
        backend: AttentionBackend, wrap: Callable[[Forward], Forward], max_draft_tokens: int
    ) -> list[list[int]]:
        cache = KVCache(loaded.layers, 20, 16, torch.float32, device)
        if max_draft_tokens:
            for key, value in cache.layers.values():
                key.fill_(float("nan"))
                value.fill_(float("nan"))
        blocks = BlockManager(20, 16)
        scheduler = Scheduler(
            blocks, max_step_tokens=40, max_num_seqs=8, max_draft_tokens=max_draft_tokens
        )
        engine = Engine(wrap(ModelRunner(loaded, cache, backend).forward), scheduler, device)
        requests = [
            Request(request_id=f"{index}", prompt_token_ids=prompt, max_new_tokens=6)
            for index, prompt in enumerate(REPETITIVE)
        ]
        outputs = run(engine, *requests)
        return [token_ids(outputs[request.request_id]) for request in requests]

    def recorded(forward: Forward) -> Forward:
        shapes = [*decode_shapes((2, 6, 12), with_drafts=True), Shape(40, 5, 5)]
        steps = CudaGraphs(forward, shapes, widths=TableWidths(8), vocab_size=48, device=device)
        steps.record(recorder if device.type == "cpu" else cuda_recorder(device))
        return steps

    expected = answers(ReferenceAttention(), lambda forward: forward, 0)
    assert answers(TritonAttention(), recorded, 3) == expected
    assert device.type != "cpu" or recorder.num_replays >= 3  # the prompts, and decode steps


class FakeGpu:
    """Replaces `torch.cuda`; has its current stream, and whether synchronising is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = self.default = FakeStream()
        self.mode: int | str = 0
        self.is_capturing = False
        self.streams = [self.default]
        self.recorded_on: list[FakeStream] = []
        replaced = {
            "graph_pool_handle": lambda: (0, 1),
            "Stream": self._new_stream,
            "current_stream": lambda _: self.stream,
            "set_stream": self._set_stream,
            "stream": self._on,
            "CUDAGraph": FakeGraph,
            "graph": self._capture,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self._set_mode,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def wait(self) -> None:
        """Synchronises, as a model that reads a value from the device."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.is_capturing:
            raise torch.AcceleratorError("operation not permitted when stream is capturing")

    def _new_stream(self, _: torch.device) -> FakeStream:
        self.streams.append(FakeStream())
        return self.streams[-1]

    def _set_stream(self, stream: FakeStream) -> None:
        self.stream = stream

    def _set_mode(self, mode: int | str) -> None:
        self.mode = mode

    @contextmanager
    def _on(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def _capture(self, _: FakeGraph, pool: tuple[int, int], stream: FakeStream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        self.recorded_on.append(stream)
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False
        self.stream = before  # after a failure it is not restored, as in torch


class FakeStream:
    def wait_stream(self, _: FakeStream) -> None:
        pass


class FakeGraph:
    def replay(self) -> None:
        pass


def test_a_gpu_records_everything_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    graphs(FakeModel(num_blocks=4), cuda_recorder(torch.device("cuda")))
    assert len(gpu.streams) == 2
    assert gpu.recorded_on == [gpu.streams[1]] * len(SIZES)
    assert gpu.stream is gpu.default
    assert gpu.mode == 0


def test_a_model_that_waits_for_the_device_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    engine = make_engine(wrap=lambda model: on_gpu(model, gpu.wait))
    assert gpu.recorded_on == []
    assert gpu.stream is gpu.default
    assert gpu.mode == 0
    (request,) = requests(1)
    assert token_ids(run(engine, request)["0"]) == greedy_tokens((0, 1, 2), 4)


def test_a_step_that_cannot_be_recorded_leaves_the_others_recorded() -> None:
    recorder = Recorder()

    def refuses_the_largest(step: Callable[[], object]) -> Replay:
        replay = recorder(step)
        if recorder.num_recorded == 1:
            raise torch.OutOfMemoryError("no room")
        return replay

    engine = make_engine(wrap=lambda model: graphs(model, refuses_the_largest))
    asked = requests(2)
    outputs = run(engine, *asked)
    assert recorder.num_recorded == len(SIZES)
    assert recorder.num_replays == 3  # with the second size
    for request in asked:
        tokens = token_ids(outputs[request.request_id])
        assert tokens == greedy_tokens(request.prompt_token_ids, 4)
    outputs = run(engine, *requests(5))  # only the largest would do
    assert recorder.num_replays == 3


def test_it_counts_its_replays_and_what_could_not_be_recorded() -> None:
    recorder, made = Recorder(), []

    def refuses_the_largest(step: Callable[[], object]) -> Replay:
        replay = recorder(step)
        if recorder.num_recorded == 1:
            raise torch.OutOfMemoryError("no room")
        return replay

    def wrap(model: FakeModel) -> CudaGraphs:
        made.append(graphs(model, refuses_the_largest))
        return made[0]

    run(make_engine(wrap=wrap), *requests(2))
    assert (made[0].num_replays, made[0].num_missing) == (3, 1)
    assert graphs(FakeModel(num_blocks=4), Recorder()).num_missing == 0
    assert missing_recordings(made[0]) == (
        "steps of 1 sizes could not be recorded: they wait for Python",
    )


@pytest.mark.parametrize("is_hidden", [False, True])
def test_too_little_memory_for_the_largest_steps_leaves_all_smaller_ones_recorded(
    is_hidden: bool,
) -> None:
    """Torch may tell of it in other words: a recording that was broken off cannot be ended."""
    tried: list[int] = []

    def is_short(step: Callable[[], object]) -> Replay:
        tried.append(1)
        if len(tried) >= len(SIZES):
            return Recorder()(step)
        try:
            raise torch.OutOfMemoryError("no room")
        except torch.OutOfMemoryError:
            if is_hidden:
                raise RuntimeError("the capture is invalid")  # noqa: B904  as an exit does
            raise

    recorded = graphs(FakeModel(num_blocks=16), is_short)
    assert (len(tried), recorded.num_missing) == (len(SIZES), len(SIZES) - 1)


def test_a_model_that_cannot_be_recorded_is_not_tried_with_every_size() -> None:
    tried: list[int] = []

    def refuses(_: Callable[[], object]) -> Replay:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    recorded = graphs(FakeModel(num_blocks=16), refuses)
    assert (len(tried), recorded.num_missing) == (2, len(SIZES))


def test_a_batch_takes_a_larger_size_where_its_own_was_not_recorded() -> None:
    recorder = Recorder()

    def refuses_the_second(step: Callable[[], object]) -> Replay:
        replay = recorder(step)
        if recorder.num_recorded == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return replay

    engine = make_engine(wrap=lambda model: graphs(model, refuses_the_second))
    run(engine, *requests(2))
    assert recorder.num_replays == 3


def test_a_recording_that_fails_leaves_the_thread_on_its_own_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch)

    def fails_while_capturing() -> None:
        if gpu.is_capturing:
            raise torch.AcceleratorError("operation failed due to a previous error")

    make_engine(wrap=lambda model: on_gpu(model, fails_while_capturing))
    assert len(gpu.recorded_on) == 2  # what all steps have in common is not tried further
    assert gpu.stream is gpu.default


def on_gpu(model: FakeModel, before: Callable[[], object]) -> CudaGraphs:
    """Graphs of a model that calls `before` first, recorded as on a GPU."""

    def forward(batch: ModelInput) -> Tensor:
        before()
        return model(batch)

    return graphs(forward, cuda_recorder(torch.device("cuda")))
