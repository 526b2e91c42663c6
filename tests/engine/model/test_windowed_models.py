"""Layers with a window keep no more than it, and models still give the tokens of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cohere2Config, Gemma3TextConfig, GptOssConfig, Qwen2Config

from engine.batch.recorded_rows import TableWidths
from engine.build import build_engine
from engine.engine import Engine
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig, EngineInfo
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request, SamplingParams
from engine.replay.cuda_graphs import CudaGraphs
from engine.replay.shapes import Shape
from engine.scheduling.sequence import Sequence
from engine.scheduling.window_blocks import WindowBlockManager
from tests.engine.fakes import CPU, run, token_ids
from tests.engine.model.architectures import (
    ARCHITECTURES,
    NUM_NEW_TOKENS,
    PECULIAR,
    SMALL,
    build_model,
    continuation,
    make_prompts,
)
from tests.on_demand import on_demand

pytestmark = pytest.mark.usefixtures("one_thread")

_WINDOW: dict[str, Any] = {"sliding_window": 9}
_FOUR: dict[str, Any] = {**SMALL, "num_hidden_layers": 4, "head_dim": 16, **_WINDOW}
WINDOWED: dict[str, Callable[[], Any]] = {
    **{name: ARCHITECTURES[name] for name in ("mistral", "gemma2", "gemma3")},
    "llama4": PECULIAR["llama4"],
    "gpt_oss": lambda: GptOssConfig(**_FOUR, num_local_experts=4, num_experts_per_tok=2),
    "cohere2": lambda: Cohere2Config(**_FOUR, sliding_window_pattern=4),
    # One in six, as published: blocks with a window have a place that no layer takes.
    "gemma3, six layers": lambda: Gemma3TextConfig(
        **{**_FOUR, "num_hidden_layers": 8}, sliding_window_pattern=6
    ),
}
SAMPLE = ("mistral", "gemma3", "llama4", "gpt_oss")
LONG = tuple(range(3, 103))


def config(directory: Path, **options: Any) -> EngineConfig:
    given = {
        "block_size": 4,
        "max_total_tokens": 128,
        "max_step_tokens": 16,
        "max_batch_total_tokens": 128,
        **options,
    }
    return EngineConfig(
        model_id=str(directory / "model"), socket_path=directory / "s", device="cpu", **given
    )


def served(name: str, directory: Path, **options: Any) -> tuple[Engine, EngineInfo]:
    """An engine as it is served, of which few sequences fit into the cache."""
    build_model(WINDOWED[name]()).save_pretrained(directory / "model")
    return build_engine(config(directory, **options))


def blocks_of(engine: Engine) -> WindowBlockManager:
    blocks = engine._scheduler.blocks
    assert isinstance(blocks, WindowBlockManager)
    return blocks


def request_of(number: int, prompt: tuple[int, ...], **options: Any) -> Request:
    given = {"max_new_tokens": NUM_NEW_TOKENS, **options}
    return Request(request_id=str(number), prompt_token_ids=prompt, **given)


@cache
def generated(name: str, prompt: tuple[int, ...], num_tokens: int = NUM_NEW_TOKENS) -> list[int]:
    """The greedy continuation by transformers."""
    return continuation(build_model(WINDOWED[name]()), prompt, num_tokens)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in SAMPLE),
        ("gemma3", {"enable_native_kernels": False}),
        *(pytest.param(name, {}, marks=on_demand) for name in WINDOWED if name not in SAMPLE),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """In batches, in chunks, recorded and not, and with a prefix in the cache."""
    prompts = [*make_prompts()[:5], LONG]
    engine, _ = served(name, tmp_path, **options)
    assert blocks_of(engine).form is not None
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    expected = [generated(name, prompt) for prompt in prompts]
    assert len({token_id for tokens in expected for token_id in tokens}) > 5, "tokens differ"
    assert [token_ids(outputs[str(i)]) for i in range(len(prompts))] == expected
    before = engine.stats().num_cached_tokens
    assert token_ids(run(engine, request_of(9, LONG))["9"]) == expected[-1]
    assert engine.stats().num_cached_tokens - before >= 84
    engine.check_integrity()


@pytest.mark.parametrize(("name", "num_tokens"), [("mistral", 36), ("gemma3", 64)])
def test_texts_are_computed_again_after_a_preemption(
    name: str, num_tokens: int, tmp_path: Path
) -> None:
    engine, _ = served(name, tmp_path, max_total_tokens=64, max_batch_total_tokens=num_tokens)
    prompts = [prompt[:40] for prompt in make_prompts()]
    outputs = run(
        engine, *(request_of(i, prompt, max_new_tokens=24) for i, prompt in enumerate(prompts))
    )
    assert engine.stats().num_preemptions > 0
    for number, prompt in enumerate(prompts):
        assert token_ids(outputs[str(number)]) == generated(name, prompt, 24)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_refused_draft_tokens_change_nothing(name: str, tmp_path: Path) -> None:
    engine, _ = served(name, tmp_path, speculate=3)
    prompt = (7, 8, 9) * 12
    for number in range(2):
        answer = run(engine, request_of(number, prompt, max_new_tokens=30))[str(number)]
        assert token_ids(answer) == generated(name, prompt, 30)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_steps_that_run_ahead_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    engine, _ = served(name, tmp_path, run_ahead=True)
    prompts = [*make_prompts()[:4], LONG]
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    for number, prompt in enumerate(prompts):
        assert token_ids(outputs[str(number)]) == generated(name, prompt)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_steps_that_are_padded_to_a_recorded_size_give_the_same_tokens(
    name: str, tmp_path: Path
) -> None:
    """As on a GPU, whose recordings read fixed addresses."""
    engine, _ = served(name, tmp_path, graph_sizes=())
    widths = TableWidths.of(128, 4, blocks_of(engine).form)
    shapes = [Shape(8, 8, 8), Shape(4, 4, 4), Shape(16, 4, 4)]
    graphs = CudaGraphs(
        engine._executor._forward, shapes, widths=widths, vocab_size=128, device=CPU
    )
    replays: list[int] = []
    graphs.record(lambda run: lambda: (replays.append(1), run()))
    engine._executor._forward = graphs
    prompts = [*make_prompts()[:4], LONG]
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    for number, prompt in enumerate(prompts):
        assert token_ids(outputs[str(number)]) == generated(name, prompt)
    assert len(replays) >= NUM_NEW_TOKENS


def test_a_text_that_another_engine_began_is_continued(tmp_path: Path) -> None:
    whole = generated("gemma3", LONG)
    engine, _ = served("gemma3", tmp_path)
    request = replace(request_of(0, LONG), resumed_token_ids=tuple(whole[:4]))
    assert token_ids(run(engine, request)["0"]) == whole[4:]


def test_a_seed_gives_the_same_text_alone_and_beside_others(tmp_path: Path) -> None:
    sampling = SamplingParams(do_sample=True, seed=11, temperature=0.8)
    wanted = request_of(0, make_prompts()[1], sampling=sampling)
    others = [request_of(i, prompt) for i, prompt in enumerate(make_prompts()) if i]
    engine, _ = served("gemma2", tmp_path)
    alone = token_ids(run(engine, wanted)["0"])
    assert token_ids(run(engine, *others[:3], wanted, *others[3:])["0"]) == alone


def test_an_8_bit_cache_holds_the_same_blocks(tmp_path: Path) -> None:
    engine, info = served("gemma3", tmp_path, kv_cache_dtype="fp8_e5m2")
    assert len(token_ids(run(engine, request_of(0, LONG))["0"])) == NUM_NEW_TOKENS
    assert info.max_batch_total_tokens > 128


@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
def test_a_long_text_holds_its_window_and_the_whole_layers_share(name: str, tmp_path: Path) -> None:
    engine, _ = served(name, tmp_path)
    form = blocks_of(engine).form
    assert form is not None
    engine.add(request_of(0, LONG, max_new_tokens=20))
    held = []
    while engine.has_work:
        engine.step()
        held += [_held(sequence) for sequence in engine._scheduler.running]
    assert max(windowed for _, windowed in held) <= form.num_windowed(128, 16)
    assert held[-1] == (form.num_whole(len(LONG) + 19), held[-1][1])
    assert held[-1][1] <= form.num_windowed(128)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def _held(sequence: Sequence) -> tuple[int, int]:
    """Blocks of layers that see everything, and of those with a window."""
    return len(sequence.block_table), len(sequence.window_table) - sequence.num_left_blocks


@pytest.mark.parametrize("name", ["gemma3", "gemma3, six layers"])
def test_as_many_long_texts_run_as_the_engine_says(name: str, tmp_path: Path) -> None:
    engine, info = served(name, tmp_path, max_batch_total_tokens=128)
    count = info.max_batch_total_tokens // info.max_total_tokens
    assert count > 1
    for number in range(count):
        prompt = (number + 3, *range(3, 50))
        assert engine.add(request_of(number, prompt, max_new_tokens=80)) is None
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(engine._scheduler.running))
    assert most == count
    assert engine.stats().num_preemptions == 0


def test_texts_within_the_window_have_blocks_of_one_kind(tmp_path: Path) -> None:
    build_model(
        Qwen2Config(
            **{**SMALL, "use_sliding_window": True, "sliding_window": 64}, max_window_layers=1
        )
    ).save_pretrained(tmp_path / "model")
    for limit, kind in ((64, "BlockManager"), (256, "WindowBlockManager")):
        options = {"max_total_tokens": limit, "max_batch_total_tokens": limit}
        engine, _ = build_engine(config(tmp_path, **options))
        assert type(engine._scheduler.blocks).__name__ == kind


def test_windows_are_those_that_attention_is_computed_with() -> None:
    def windows(name: str) -> dict[int, int]:
        return attach_paged_attention(build_model(WINDOWED[name]()), CPU, torch.float32).windows

    assert windows("gemma3") == {0: 9, 2: 9}
    assert windows("mistral") == {0: 9, 1: 9, 2: 9}
    assert windows("llama4") == {0: 32, 1: 32}
    assert windows("cohere2") == {0: 9, 1: 9, 2: 9}


def test_too_little_memory_for_the_longest_text_is_said_in_blocks(tmp_path: Path) -> None:
    with pytest.raises(
        ModelLoadError, match="would have 7 blocks, and `max_total_tokens=128` takes 24"
    ):
        served("gemma3", tmp_path, max_batch_total_tokens=16)
