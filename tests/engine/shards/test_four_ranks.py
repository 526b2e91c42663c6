"""Four ranks, of which two share a key head, give the tokens of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from engine.build import build_engine
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import SMALL, build_model, make_prompts
from tests.engine.native import threads
from tests.engine.shards.team import team

MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL | {"num_key_value_heads": 2}),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL | {"num_key_value_heads": 2},
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
}


def test_four_ranks_give_the_tokens_of_one(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    requests = [
        Request(request_id=f"{number}", prompt_token_ids=prompt, max_new_tokens=6)
        for number, prompt in enumerate(make_prompts())
    ]
    with threads(1), team(pytestconfig, tmp_path / "meeting", 4) as four:
        for name, model in MODELS.items():
            directory = tmp_path / name
            build_model(model).save_pretrained(directory)
            config = EngineConfig(
                model_id=str(directory),
                socket_path=tmp_path / "socket",
                device="cpu",
                num_threads=1,
                max_step_tokens=32,
                max_batch_total_tokens=1024,
                max_total_tokens=128,
            )
            together = run(four.build(config), *requests)
            alone = run(build_engine(config)[0], *requests)
            assert {key: token_ids(found) for key, found in together.items()} == {
                key: token_ids(found) for key, found in alone.items()
            }, name
