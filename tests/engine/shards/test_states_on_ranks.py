"""Two ranks keep the states of texts as one process does, whatever a step computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.build import build_engine
from engine.protocol.config import GRAPH_SIZES, EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import SamplingParams
from engine.replay.cpu_recorder import CpuGraph
from tests.engine.adapters.made import make, merged_tokens
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import NUM_NEW_TOKENS, make_prompts
from tests.engine.native import needs_compiler
from tests.engine.recurrent.stateful import STATEFUL, generated, stateful_model
from tests.engine.recurrent.test_stateful_models import LONG, request_of
from tests.engine.shards.team import Team
from tests.on_demand import ALL_MODELS

SAMPLE = ("qwen3_5", "kimi_linear", "falcon_h1")
REFUSED = {"granite_hybrid", "nemotron_h", "mamba", "mamba2", "falcon_mamba"}
DIVIDED = sorted(STATEFUL.keys() - REFUSED)


def configured(name: str, folder: Path, **options: Any) -> EngineConfig:
    """A random checkpoint, of which few sequences fit into the cache."""
    stateful_model(name).save_pretrained(folder / "model")
    given = {"block_size": 4, "max_total_tokens": 256, "max_step_tokens": 16, "num_threads": 1}
    return EngineConfig(
        model_id=str(folder / "model"),
        socket_path=folder / "unused.sock",
        device="cpu",
        **{**given, **options},
    )


@pytest.mark.parametrize("name", DIVIDED if ALL_MODELS else SAMPLE)
def test_two_ranks_give_the_tokens_of_one(name: str, pair: Team, tmp_path: Path) -> None:
    """In batches of prompts and decoding sequences, in chunks, and after preemptions."""
    engine = pair.build(configured(name, tmp_path, max_batch_total_tokens=256, max_num_seqs=8))
    prompts = [*make_prompts()[:5], LONG]
    outputs = run(engine, *(request_of(i, prompt) for i, prompt in enumerate(prompts)))
    assert [token_ids(outputs[str(i)]) for i in range(len(prompts))] == [
        generated(name, prompt, NUM_NEW_TOKENS) for prompt in prompts
    ]


def test_prefixes_are_shared_where_a_state_is_kept(pair: Team, tmp_path: Path) -> None:
    engine = pair.build(configured("qwen3_5", tmp_path, max_num_seqs=8))
    cached = []
    for prompt in (LONG, LONG, (*LONG[:50], 5, 6, 7), (*LONG[:50], 8, 9)):
        outputs = run(engine, request_of(0, prompt))["0"]
        assert token_ids(outputs) == generated("qwen3_5", prompt, NUM_NEW_TOKENS)
        cached.append(outputs[0].num_cached_tokens)
    assert cached == [0, 192, 0, 48]


def test_draft_tokens_that_are_refused_leave_no_trace(pair: Team, tmp_path: Path) -> None:
    engine = pair.build(configured("qwen3_5", tmp_path, speculate=3, max_num_seqs=4))
    prompts = [(7, 8, 9) * 12, LONG[:70], (5, 6) * 9, (*LONG[:50], 3, 4, 3, 4)]
    outputs = run(engine, *(request_of(i, p, max_new_tokens=24) for i, p in enumerate(prompts)))
    for number, prompt in enumerate(prompts):
        assert token_ids(outputs[str(number)]) == generated("qwen3_5", prompt, 24)


@needs_compiler
def test_recorded_steps_give_the_same_bits(
    pair: Team, tmp_path: Path, replayed: list[CpuGraph]
) -> None:
    answers = []
    for sizes in ((), GRAPH_SIZES):
        # Without prefixes, since steps that keep a state are not recorded.
        options = {"graph_sizes": sizes, "enable_prefix_caching": False}
        engine = pair.build(configured("qwen3_5", tmp_path / str(len(sizes)), **options))
        replayed.clear()
        requests = [request_of(i, prompt) for i, prompt in enumerate(make_prompts()[:3])]
        outputs = run(engine, *requests)
        answers.append([[output.token for output in outputs[it.request_id]] for it in requests])
    assert len(replayed) > 4
    assert answers[0] == answers[1]


def test_steps_run_ahead_of_their_tokens(pair: Team, tmp_path: Path) -> None:
    config = configured("qwen3_5", tmp_path, run_ahead=True)
    sampling = SamplingParams(do_sample=True, seed=11, temperature=0.8)
    requests = [
        request_of(i, prompt, sampling=sampling) for i, prompt in enumerate(make_prompts()[:4])
    ]
    alone = run(build_engine(replace(config, run_ahead=False))[0], *requests)
    together = run(pair.build(config), *requests)
    for request in requests:
        name = request.request_id
        assert token_ids(together[name]) == token_ids(alone[name])


def test_adapters_are_those_of_one_process(pair: Team, tmp_path: Path) -> None:
    """Of layers with a state and others; a layer with a state gets each sequence's rows apart."""
    layers = ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "o_proj", "down_proj"]
    settings = {"r": 3, "lora_alpha": 2, "target_modules": layers}
    made = make(stateful_model("qwen3_5"), tmp_path / "adapters", {"a": settings})
    config = configured("qwen3_5", tmp_path, adapters=made.pairs, max_num_seqs=6)
    prompts = [LONG[:40], make_prompts()[1]]
    engine = pair.build(config)
    assert engine.adapters is not None
    (adapter,) = engine.adapters.listed()
    owners = {"": "", "a": adapter.digest}
    requests = {
        (owner, number): request_of(f"{owner}{number}", prompt, adapter=digest)
        for number, prompt in enumerate(prompts)
        for owner, digest in owners.items()
    }
    outputs = run(engine, *requests.values())
    for owner in owners:
        found = [token_ids(outputs[f"{owner}{number}"]) for number in range(len(prompts))]
        assert found == merged_tokens(made, owner, prompts, NUM_NEW_TOKENS)


@pytest.mark.parametrize("name", sorted(REFUSED) if ALL_MODELS else ["mamba2"])
def test_a_model_without_a_plan_is_refused(name: str, pair: Team, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="transformers has no plan of how"):
        pair.build(configured(name, tmp_path))
