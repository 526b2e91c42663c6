"""Two ranks give the tokens of one, whatever the model, and whatever else is in the batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from engine.batch.model_input import ModelInput
from engine.build import build_engine
from engine.engine import Engine
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request, SamplingParams, Token
from engine.ranks.plan_channel import PlanSender
from engine.replay.cpu_recorder import CpuGraph
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import SMALL, build_model, make_prompts
from tests.engine.model.quantized import compress
from tests.engine.native import needs_compiler
from tests.engine.shards.team import Team
from tests.gguf_models import write_gguf

_HEADS: dict[str, Any] = {"head_dim": 16}
_WINDOW: dict[str, Any] = {"sliding_window": 9}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, PretrainedConfig] = {
    "llama, embeddings not tied": LlamaConfig(**SMALL),
    "llama, one key head": LlamaConfig(**SMALL | {"num_key_value_heads": 1}),
    "llama, biases, tied embeddings": LlamaConfig(
        **SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama, odd vocabulary": LlamaConfig(**SMALL | {"vocab_size": 129}),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, **_HEADS),
    "gemma2": Gemma2Config(**SMALL, **_HEADS, **_WINDOW),
    "gemma3": Gemma3TextConfig(
        **SMALL,
        **_HEADS,
        **_WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3, whole attention on each rank": Phi3Config(**SMALL),
    "olmo2, whole norms of heads": Olmo2Config(**SMALL),
    "qwen3 moe": Qwen3MoeConfig(**SMALL, **_HEADS, **_EXPERTS, num_experts=4),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def _config(directory: Path, model: PretrainedConfig, **options: Any) -> EngineConfig:
    """A configuration for a random checkpoint, whose prompts are computed in several steps."""
    build_model(model).save_pretrained(directory)
    defaults = {"max_step_tokens": 32, "max_batch_total_tokens": 1024, "max_total_tokens": 128}
    return EngineConfig(
        model_id=str(directory),
        socket_path=directory / "socket",
        device="cpu",
        num_threads=1,
        **{**defaults, **options},
    )


def _requests(**sampling: Any) -> list[Request]:
    return [
        Request(
            request_id=f"{number}",
            prompt_token_ids=prompt,
            max_new_tokens=8,
            sampling=SamplingParams(**sampling),
        )
        for number, prompt in enumerate(make_prompts())
    ]


def _tokens(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    return {name: token_ids(outputs) for name, outputs in run(engine, *requests).items()}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_give_the_tokens_of_one(name: str, pair: Team, tmp_path: Path) -> None:
    config = _config(tmp_path, MODELS[name])
    alone = build_engine(config)[0]
    together = pair.build(config)
    requests = _requests()
    assert _tokens(together, requests) == _tokens(alone, requests)


@needs_compiler
def test_small_steps_are_recorded_and_replayed(
    pair: Team, tmp_path: Path, replayed: list[CpuGraph]
) -> None:
    config = _config(tmp_path, MODELS["qwen3 moe"], graph_sizes=(8,))
    together = pair.build(config)
    replayed.clear()
    requests = _requests()[:3]
    tokens = _tokens(together, requests)
    assert _tokens(together, requests) == tokens
    assert len(replayed) >= 6, "of 14 steps that follow the prompts"
    assert together.stats().num_replayed_steps == len(replayed)
    assert tokens == _tokens(build_engine(replace(config, graph_sizes=(0,)))[0], requests)


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=needs_compiler), {"enable_native_kernels": False}],
    ids=["recorded steps", "torch"],
)
def test_steps_run_ahead_of_their_tokens(
    options: dict[str, Any], pair: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has ids that stand for tokens, and each rank gets these from the first."""
    plans: list[ModelInput] = []
    send = PlanSender.send
    monkeypatch.setattr(
        PlanSender, "send", lambda sender, batch: plans.append(batch) or send(sender, batch)
    )
    config = _config(tmp_path, MODELS["llama, biases, tied embeddings"], run_ahead=True, **options)
    together = pair.build(config)
    requests = _requests(do_sample=True, seed=7, temperature=1.2)
    tokens = _tokens(together, requests)
    ahead = [plan for plan in plans if plan.previous is not None]
    assert len(ahead) > len(plans) / 2
    assert all(int(plan.input_ids.min()) < 0 for plan in ahead)
    assert tokens == _tokens(build_engine(replace(config, run_ahead=False))[0], requests)


def _log_probabilities(engine: Engine, requests: list[Request]) -> dict[str, list[Token]]:
    """Tokens with their log-probabilities, and those of the likeliest others."""
    return {
        name: [output.token for output in outputs if output.token is not None]
        for name, outputs in run(engine, *requests).items()
    }


@needs_compiler
@pytest.mark.parametrize("name", ["llama, biases, tied embeddings", "qwen3", "gemma3"])
def test_a_text_is_the_same_bit_for_bit_whatever_else_is_in_the_batch(
    name: str, pair: Team, tmp_path: Path
) -> None:
    engine = pair.build(_config(tmp_path, MODELS[name], enable_prefix_caching=False))
    requests = _requests(do_sample=True, seed=5, temperature=1.5, top_n_tokens=3)
    together = _log_probabilities(engine, requests)
    for request in requests:
        alone = _log_probabilities(engine, [request])
        assert alone[request.request_id] == together[request.request_id]


def test_each_rank_says_what_it_keeps_in_memory(pair: Team, tmp_path: Path) -> None:
    """Half of everything but norms and rotary embeddings; packed weights would be padded."""
    config = _config(tmp_path, LlamaConfig(**SMALL), enable_native_kernels=False)
    engine, divided = pair.build_described(config)
    (whole,) = build_engine(config)[1].ranks
    first, second = divided.ranks
    assert first == second
    model = build_model(LlamaConfig(**SMALL))
    norms = sum(it.nbytes for name, it in model.named_parameters() if "norm" in name)
    rotations = whole.weights_bytes - sum(it.nbytes for it in model.parameters())
    assert 2 * first.weights_bytes == whole.weights_bytes + norms + rotations
    assert 2 * first.cache_bytes == whole.cache_bytes
    assert engine.stats().num_blocks == 1024 // config.block_size


_WIDE = SMALL | {"hidden_size": 128, "intermediate_size": 256}


@pytest.mark.parametrize(
    ("quantize", "model"),
    [
        ("int8", LlamaConfig(**_WIDE)),
        ("int4", LlamaConfig(**_WIDE)),
        ("int8", Qwen3MoeConfig(**_WIDE, **_HEADS, **_EXPERTS, num_experts=4)),
    ],
)
def test_the_parts_are_quantised(
    quantize: str, model: PretrainedConfig, pair: Team, tmp_path: Path
) -> None:
    """Scales are those of each rank's part, so that only most tokens are those of one rank."""
    config = _config(tmp_path, model, quantize=quantize)
    requests = _requests()
    together = _tokens(pair.build(config), requests)
    alone = _tokens(build_engine(config)[0], requests)
    first = [(together[name][0], alone[name][0]) for name in alone]
    assert sum(one == other for one, other in first) >= len(first) * 2 / 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Qwen3Config(**SMALL | {"num_attention_heads": 3, "num_key_value_heads": 3}, **_HEADS),
            "its 3 heads of model.layers.0.self_attn.q_proj cannot be divided among 2 ranks",
        ),
        (
            Qwen3Config(**SMALL | {"num_attention_heads": 6, "num_key_value_heads": 3}, **_HEADS),
            "its 3 heads of model.layers.0.self_attn.k_proj cannot be divided among 2 ranks",
        ),
        (
            LlamaConfig(**SMALL | {"intermediate_size": 95}),
            "95 of model.layers.0.mlp.gate_proj cannot be divided among 2 ranks",
        ),
        (
            GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4),
            "transformers has no plan of how its layers are divided",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(
    model: PretrainedConfig, message: str, pair: Team, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        pair.build(_config(tmp_path, model))


def test_a_checkpoint_of_compressed_tensors_is_divided(pair: Team, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the extra `quantized`")
    config = _config(tmp_path, LlamaConfig(**SMALL))
    whole = _tokens(build_engine(config)[0], _requests())
    compress(tmp_path)
    alone = _tokens(build_engine(config)[0], _requests())
    assert alone != whole
    assert _tokens(pair.build(config), _requests()) == alone


def test_a_gguf_file_is_divided(pair: Team, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    config = EngineConfig(
        model_id=str(path),
        socket_path=tmp_path / "socket",
        device="cpu",
        num_threads=1,
        max_batch_total_tokens=1024,
    )
    assert _tokens(pair.build(config), _requests()) == _tokens(build_engine(config)[0], _requests())


def test_a_checkpoint_whose_weights_stay_packed_is_refused(pair: Team, tmp_path: Path) -> None:
    config = _config(tmp_path, LlamaConfig(**SMALL))
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelLoadError, match=r"quantised already \(fp8\), and its packed"):
        pair.build(config)
