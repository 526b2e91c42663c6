"""Two ranks say of images what one process says, of which the first alone encodes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.peft_directory import read_adapter
from engine.build import build_engine
from engine.engine import Engine
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request, SamplingParams, Token
from tests.engine.fakes import run
from tests.engine.images.models import FAMILIES, Family
from tests.engine.images.test_images import (
    answers,
    asked,
    conversations,
    with_adapter,
)
from tests.engine.native import needs_compiler
from tests.engine.shards.team import Team
from tests.on_demand import ALL_MODELS

# Three positions per token and layers added to, and attention in both directions.
SAMPLE = ("qwen3_vl", "gemma3")


@pytest.fixture(params=FAMILIES if ALL_MODELS else SAMPLE)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def configured(family: Family, folder: Path, **options: Any) -> EngineConfig:
    """A random checkpoint, whose images are computed in several steps where they may be."""
    family.build().save_pretrained(folder)
    return replace(family.engine_config(folder), **options)


def log_probabilities(engine: Engine, requests: list[Request]) -> dict[str, list[Token]]:
    """Tokens with their log-probabilities, and those of the likeliest others."""
    return {
        name: [output.token for output in outputs if output.token is not None]
        for name, outputs in run(engine, *requests).items()
    }


def test_two_ranks_give_the_tokens_of_one(family: Family, pair: Team, tmp_path: Path) -> None:
    config = configured(family, tmp_path)
    requests = [asked(name, one) for name, one in conversations(family).items()]
    engine, info = pair.build_described(config)
    assert info.takes_images
    assert answers(engine, requests) == answers(build_engine(config)[0], requests)


def test_steps_run_ahead_of_their_tokens(pair: Team, tmp_path: Path) -> None:
    family = FAMILIES["qwen2_5_vl"]
    config = configured(family, tmp_path, run_ahead=True)
    sampling = SamplingParams(do_sample=True, seed=7, temperature=1.2)
    requests = [
        replace(asked(name, one), sampling=sampling) for name, one in conversations(family).items()
    ]
    alone = build_engine(replace(config, run_ahead=False))[0]
    assert answers(pair.build(config), requests) == answers(alone, requests)


def test_an_image_that_cannot_be_encoded_ends_its_request_alone(pair: Team, tmp_path: Path) -> None:
    """The other rank hears nothing of it."""
    family = FAMILIES["llava"]
    engine = pair.build(configured(family, tmp_path))
    text, image = (asked(name, conversations(family)[name]) for name in ("text", "first"))
    alone = answers(engine, [text])
    (picture,) = image.images
    (pixels,) = picture.tensors
    broken = replace(picture, tensors=(pixels._replace(shape=(1, 3, 14, 56)),))
    engine.add(replace(image, images=(broken,)))
    engine.add(text)
    outputs = [output for _ in range(40) if engine.has_work for output in engine.step().outputs]
    assert {output.request_id for output in outputs if output.error is not None} == {"first"}
    tokens = [output.token.token_id for output in outputs if output.token is not None]
    assert tokens == alone["text"]


@needs_compiler
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_adapters_are_those_of_one_process(pair: Team, tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    with_adapter(family.build(), tmp_path / "one")
    config = configured(family, tmp_path, adapters=(("one", tmp_path / "one"),))
    digest = read_adapter("one", tmp_path / "one").digest.hex()
    two = asked("two", conversations(family)["two"])
    requests = [two, replace(two, request_id="adapted", adapter=digest)]
    found = answers(pair.build(config), requests)
    assert found == answers(build_engine(config)[0], requests)
    assert found["two"] != found["adapted"]


@needs_compiler
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_text_is_the_same_bit_for_bit_whatever_else_is_in_the_batch(
    name: str, pair: Team, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    engine = pair.build(configured(family, tmp_path, enable_prefix_caching=False))
    sampling = SamplingParams(do_sample=True, seed=5, temperature=1.5, top_n_tokens=3)
    requests = [
        replace(asked(name, one), sampling=sampling) for name, one in conversations(family).items()
    ]
    together = log_probabilities(engine, requests)
    for request in requests:
        alone = log_probabilities(engine, [request])
        assert alone[request.request_id] == together[request.request_id]
