"""Models that keep a state give the tokens of `transformers.generate`, whatever a step computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.build import build_engine
from engine.engine import Engine
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import GRAPH_SIZES, EngineConfig
from engine.protocol.request import Request, SamplingParams
from engine.replay.cpu_graphs import CpuGraphs
from tests.engine.adapters.made import make, merged_tokens
from tests.engine.fakes import CPU, run, token_ids
from tests.engine.model.architectures import NUM_NEW_TOKENS, make_prompts
from tests.engine.recurrent.stateful import (
    SAMPLE,
    STATEFUL,
    TOKEN_BY_TOKEN,
    generated,
    names,
    stateful_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Merged into other layers, or read by the model itself, or of no interest here.
NOT_ADAPTED = {"kv_b_proj", "dt_proj", "gate", "gate_proj", "up_proj", "down_proj"}
NO_ADAPTED_OUTPUT = {"falcon_h1", "nemotron_h", "mamba2", "mamba", "falcon_mamba"}  # by PEFT
LONG = tuple(range(3, 100)) * 2  # more than two chunks of any layer's own code


def engine_of(name: str, directory: Path, **options: Any) -> Engine:
    """An engine as it is served, of which few sequences fit into the cache."""
    stateful_model(name).save_pretrained(directory / "model")
    given = {"block_size": 4, "max_total_tokens": 256, "max_step_tokens": 16, **options}
    config = EngineConfig(
        model_id=str(directory / "model"), socket_path=directory / "s", device="cpu", **given
    )
    return build_engine(config)[0]


def request_of(number: int | str, prompt: tuple[int, ...], **options: Any) -> Request:
    given = {"max_new_tokens": NUM_NEW_TOKENS, **options}
    return Request(request_id=str(number), prompt_token_ids=prompt, **given)


@pytest.mark.parametrize("name", names(sample=SAMPLE - {"granite_hybrid"}))
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """In batches of prompts and decoding sequences, in chunks, and after preemptions."""
    prompts = [*make_prompts()[:5], LONG[:40] if name in TOKEN_BY_TOKEN else LONG]
    engine = engine_of(name, tmp_path, max_batch_total_tokens=256, max_num_seqs=8)
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    expected = [generated(name, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    assert len({token_id for tokens in expected for token_id in tokens}) > 5, "tokens differ"
    assert [token_ids(outputs[str(i)]) for i in range(len(prompts))] == expected
    engine.check_integrity()


@pytest.mark.parametrize("name", names(sample={"qwen3_5"}))
def test_texts_are_computed_again_after_a_preemption(name: str, tmp_path: Path) -> None:
    engine = engine_of(name, tmp_path, max_total_tokens=64, max_batch_total_tokens=64)
    prompts = make_prompts()[:4]
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    assert engine.stats().num_preemptions > 0
    for number, prompt in enumerate(prompts):
        assert token_ids(outputs[str(number)]) == generated(name, prompt, NUM_NEW_TOKENS)


@pytest.mark.parametrize("name", names(sample={"lfm2"}))
def test_a_slot_that_is_used_again_has_no_trace_of_the_sequence_before(
    name: str, tmp_path: Path
) -> None:
    engine = engine_of(name, tmp_path, max_num_seqs=1)
    for number, prompt in enumerate([*make_prompts()[:4], (5,), (5, 6)]):
        answer = run(engine, request_of(number, prompt))[str(number)]
        assert token_ids(answer) == generated(name, prompt, NUM_NEW_TOKENS)


@pytest.mark.parametrize("name", names(sample={"qwen3_next"}))
def test_a_text_that_another_engine_began_is_continued(name: str, tmp_path: Path) -> None:
    prompt = make_prompts()[1]
    whole = generated(name, prompt, NUM_NEW_TOKENS)
    engine = engine_of(name, tmp_path)
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


@pytest.mark.parametrize("name", names(sample={"lfm2", "qwen3_5"}))
def test_recorded_steps_give_the_same_bits(name: str, tmp_path: Path) -> None:
    prompts = [*make_prompts()[:3], LONG[:40]]
    answers = []
    for sizes in ((), GRAPH_SIZES):
        options = {"graph_sizes": sizes, "enable_prefix_caching": False}  # copies are not recorded
        engine = engine_of(name, tmp_path / str(len(sizes)), **options)
        outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
        answers.append([[output.token for output in outputs[str(i)]] for i in range(len(prompts))])
    assert answers[0] == answers[1]
    forward = engine._executor._forward
    is_recorded = isinstance(forward, CpuGraphs) and forward.num_graphs > 1
    assert is_recorded == (name not in TOKEN_BY_TOKEN)


@pytest.mark.parametrize("name", names(sample={"lfm2", "qwen3_5"}))
def test_draft_tokens_that_are_refused_leave_no_trace(name: str, tmp_path: Path) -> None:
    """Texts that repeat themselves, so that some are accepted; beside others, and with copies."""
    engine = engine_of(name, tmp_path, speculate=3, max_num_seqs=4)
    prompts = [(7, 8, 9) * 12, LONG[:70], (5, 6) * 9, (*LONG[:50], 3, 4, 3, 4)]
    for _ in range(2):
        requests = [request_of(i, p, max_new_tokens=24) for i, p in enumerate(prompts)]
        outputs = run(engine, *requests)
        for number, prompt in enumerate(prompts):
            assert token_ids(outputs[str(number)]) == generated(name, prompt, 24)


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


@pytest.mark.parametrize("name", names(sample={"granite_hybrid"}))
def test_rows_with_adapters_have_the_tokens_of_merged_models(name: str, tmp_path: Path) -> None:
    """Of all linear layers; two adapters and none, in one batch, with prefixes and drafts."""
    everything = {"r": 3, "lora_alpha": 2, "target_modules": _linear_layers(name)}
    made = make(stateful_model(name), tmp_path, {"a": everything, "b": {**everything, "r": 2}})
    engine = engine_of(name, tmp_path, adapters=made.pairs, max_num_seqs=6, speculate=2)
    prompts = [LONG[:40], make_prompts()[1]]
    expected = {owner: merged_tokens(made, owner, prompts, NUM_NEW_TOKENS) for owner in ("", *"ab")}
    assert len({tokens[0] for rows in expected.values() for tokens in rows}) > 2, "tokens differ"
    assert engine.adapters is not None
    digests = {"": "", **{info.name: info.digest for info in engine.adapters.listed()}}
    for _ in range(2):
        requests = {
            (owner, number): request_of(f"{owner}{number}", prompt, adapter=digests[owner])
            for number, prompt in enumerate(prompts)
            for owner in digests
        }
        outputs = run(engine, *requests.values())
        for (owner, number), request in requests.items():
            assert token_ids(outputs[request.request_id]) == expected[owner][number]
    shared = engine.stats().num_cached_tokens
    assert (shared == 0) == (name in TOKEN_BY_TOKEN)


def _linear_layers(name: str) -> list[str]:
    """Names of linear layers of attention and of layers with a state, as far as PEFT takes them."""
    model = stateful_model(name)
    output = model.get_output_embeddings()
    names = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    refused = {"out_proj"} if name in NO_ADAPTED_OUTPUT else set()
    return sorted(names - refused - NOT_ADAPTED)
