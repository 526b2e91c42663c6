"""Models that keep a state give the tokens of `transformers.generate`, whatever a step computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.engine import Engine
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request, SamplingParams
from tests.engine.adapters.made import make_adapter
from tests.engine.fakes import CPU, run, token_ids
from tests.engine.model.architectures import NUM_NEW_TOKENS, make_prompts
from tests.engine.recurrent.stateful import (
    STATEFUL,
    TOKEN_BY_TOKEN,
    generated,
    names,
    stateful_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = tuple(range(3, 100)) * 2  # more than two chunks of any layer's own code


def engine_of(name: str, directory: Path, **options: Any) -> Engine:
    """An engine as it is served, of which few sequences fit into the cache."""
    stateful_model(name).save_pretrained(directory / "model")
    given = {"block_size": 4, "max_total_tokens": 256, "max_step_tokens": 16, **options}
    config = EngineConfig(
        model_id=str(directory / "model"), socket_path=directory / "s", device="cpu", **given
    )
    return build_engine(config)[0]


def request_of(number: int, prompt: tuple[int, ...], **options: Any) -> Request:
    given = {"max_new_tokens": NUM_NEW_TOKENS, **options}
    return Request(request_id=str(number), prompt_token_ids=prompt, **given)


@pytest.mark.parametrize("name", names())
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """In batches of prompts and decoding sequences, in chunks, and after preemptions."""
    prompts = [*make_prompts()[:5], LONG]
    engine = engine_of(name, tmp_path, max_batch_total_tokens=256, max_num_seqs=8)
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    expected = [generated(name, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    assert len({token_id for tokens in expected for token_id in tokens}) > 5, "tokens differ"
    assert [token_ids(outputs[str(i)]) for i in range(len(prompts))] == expected
    engine.check_integrity()


def test_texts_are_computed_again_after_a_preemption(tmp_path: Path) -> None:
    engine = engine_of("qwen3_5", tmp_path, max_total_tokens=64, max_batch_total_tokens=64)
    prompts = make_prompts()[:4]
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    assert engine.stats().num_preemptions > 0
    for number, prompt in enumerate(prompts):
        assert token_ids(outputs[str(number)]) == generated("qwen3_5", prompt, NUM_NEW_TOKENS)


@pytest.mark.parametrize("name", ["lfm2", "jamba"])
def test_a_slot_that_is_used_again_has_no_trace_of_the_sequence_before(
    name: str, tmp_path: Path
) -> None:
    engine = engine_of(name, tmp_path, max_num_seqs=1)
    for number, prompt in enumerate([*make_prompts()[:4], (5,), (5, 6)]):
        answer = run(engine, request_of(number, prompt))[str(number)]
        assert token_ids(answer) == generated(name, prompt, NUM_NEW_TOKENS)


def test_a_text_that_another_engine_began_is_continued(tmp_path: Path) -> None:
    prompt = make_prompts()[1]
    whole = generated("qwen3_next", prompt, NUM_NEW_TOKENS)
    engine = engine_of("qwen3_next", tmp_path)
    request = replace(request_of(0, prompt), resumed_token_ids=tuple(whole[:4]))
    assert token_ids(run(engine, request)["0"]) == whole[4:]


@pytest.mark.parametrize("name", names(sample={"lfm2", "qwen3_5"}))
def test_prefixes_are_shared_where_a_state_is_kept(name: str, tmp_path: Path) -> None:
    """Asked again, gone on with, and in one batch with texts that begin likewise."""
    engine = engine_of(name, tmp_path, max_num_seqs=8)
    cached = []
    for prompt in (LONG, LONG, (*LONG[:50], 5, 6, 7), (*LONG[:50], 8, 9)):
        outputs = run(engine, request_of(0, prompt))["0"]
        assert token_ids(outputs) == generated(name, prompt, NUM_NEW_TOKENS)
        cached.append(outputs[0].num_cached_tokens)
    assert cached == ([0] * 4 if name in TOKEN_BY_TOKEN else [0, 192, 0, 48])
    prompts = [LONG, *((*LONG[: 48 + number], 3) for number in range(4))]
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    for number, prompt in enumerate(prompts):
        assert token_ids(outputs[str(number)]) == generated(name, prompt, NUM_NEW_TOKENS)


def test_a_conversation_goes_on_from_its_answer(tmp_path: Path) -> None:
    engine = engine_of("qwen3_5", tmp_path)
    prompt = make_prompts()[1]
    answer = token_ids(run(engine, request_of(0, prompt))["0"])
    longer = (*prompt, *answer, 7, 8, 9)
    outputs = run(engine, request_of(1, longer))["1"]
    assert token_ids(outputs) == generated("qwen3_5", longer, NUM_NEW_TOKENS)
    assert outputs[0].num_cached_tokens == (len(prompt) + NUM_NEW_TOKENS - 1) // 4 * 4


def test_nothing_is_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of("lfm2", tmp_path, speculate=3)
    prompt = (7, 8, 9) * 12
    answer = run(engine, request_of(0, prompt, max_new_tokens=30))["0"]
    assert token_ids(answer) == generated("lfm2", prompt, 30)
    assert "no draft tokens" in caplog.text


def test_a_seed_gives_the_same_text_alone_and_beside_others(tmp_path: Path) -> None:
    sampling = SamplingParams(do_sample=True, seed=11, temperature=0.8)
    wanted = request_of(0, make_prompts()[1], sampling=sampling)
    others = [request_of(i, prompt) for i, prompt in enumerate(make_prompts()) if i]
    engine = engine_of("granite_hybrid", tmp_path)
    alone = token_ids(run(engine, wanted)["0"])
    assert token_ids(run(engine, *others[:3], wanted, *others[3:])["0"]) == alone


@pytest.mark.parametrize("name", STATEFUL)
def test_layers_that_cannot_go_on_with_several_tokens_get_one_at_a_time(name: str) -> None:
    loaded = attach_paged_attention(stateful_model(name), CPU, torch.float32)
    assert loaded.recurrence is not None
    assert loaded.recurrence.token_by_token == (name in TOKEN_BY_TOKEN)


@pytest.mark.parametrize(("module", "refused"), [("in_proj", True), ("q_proj", False)])
def test_adapters_of_layers_with_a_state_are_refused(
    module: str, refused: bool, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    stateful_model("lfm2").save_pretrained(model)
    path = make_adapter(model, tmp_path / "a", 0, r=2, lora_alpha=4, target_modules=[module])
    adapters = (("a", str(path)),)
    if refused:
        with pytest.raises(ModelLoadError, match=r"a layer that keeps a state \(.*in_proj\)"):
            engine_of("lfm2", tmp_path, adapters=adapters)
    else:
        engine_of("lfm2", tmp_path, adapters=adapters)
