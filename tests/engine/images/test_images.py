"""Prompts with images have the continuations that transformers gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from engine.adapters.peft_directory import read_adapter
from engine.build import build_engine
from engine.engine import Engine
from engine.images.encoder import ImageEncoder
from engine.protocol.request import Request
from tests.engine.images.models import BLOCK_SIZE, FAMILIES, Family, Prompt, prompt
from tests.engine.native import needs_compiler
from tests.on_demand import ALL_MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_NEW_TOKENS = 12
TEXT = [11, 23, 37, 41, 53]
MORE = [*range(60, 81)]


# One position per token, three, layers added to, and attention in both directions.
SAMPLE = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
TRIED = FAMILIES if ALL_MODELS else SAMPLE


@pytest.fixture(scope="module", params=TRIED)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    family.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(family: Family) -> Any:
    return family.build()


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[ImageEncoder]:
    """The encoders of engines that are built."""
    made: list[ImageEncoder] = []
    init = ImageEncoder.__init__

    def noting(self: ImageEncoder, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(ImageEncoder, "__init__", noting)
    return made


Build = Callable[..., Engine]


@pytest.fixture
def build(family: Family, checkpoint: Path, encoders: list[ImageEncoder]) -> Build:
    config = family.engine_config(checkpoint)
    return lambda **changes: build_engine(replace(config, **changes))[0]


def asked(name: str, asked_for: Prompt) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tuple(asked_for.token_ids),
        max_new_tokens=NUM_NEW_TOKENS,
        images=asked_for.images(),
    )


def answers(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """The tokens of requests that run together."""
    found: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert engine.add(request) is None
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            if output.token is not None:
                found[output.request_id].append(output.token.token_id)
    engine.check_integrity()
    return found


def conversations(family: Family) -> dict[str, Prompt]:
    large, small = family.picture(1, 4, 6), family.picture(2, 2, 3)
    return {
        "first": prompt(large, TEXT),
        "last": prompt(MORE, TEXT, small),
        "two": prompt(TEXT, small, MORE, large, TEXT),
        "text": prompt(MORE),
    }


@pytest.fixture(scope="module")
def expected(family: Family, stock: Any) -> dict[str, list[int]]:
    return {
        name: one.continued(stock, NUM_NEW_TOKENS, family.types)
        for name, one in conversations(family).items()
    }


@pytest.mark.parametrize("options", [{}, {"run_ahead": True}, {"speculate": 3}], ids=str)
def test_a_batch_has_the_tokens_of_generate(
    build: Build, family: Family, expected: dict[str, list[int]], options: dict[str, Any]
) -> None:
    """In chunks whose borders are within images."""
    engine = build(**options)
    requests = [asked(name, one) for name, one in conversations(family).items()]
    assert answers(engine, requests) == expected


def test_an_image_that_comes_again_is_encoded_once(
    build: Build, family: Family, expected: dict[str, list[int]], encoders: list[ImageEncoder]
) -> None:
    engine = build(enable_prefix_caching=False)
    chats = conversations(family)
    for name in ("first", "two", "last"):
        assert answers(engine, [asked(name, chats[name])])[name] == expected[name]
    assert encoders[0].num_encoded == 2


def test_results_that_are_dropped_are_computed_again(
    build: Build, family: Family, expected: dict[str, list[int]], encoders: list[ImageEncoder]
) -> None:
    engine = build(image_cache_bytes=1, enable_prefix_caching=False)
    for _ in range(2):
        found = answers(engine, [asked("two", conversations(family)["two"])])
        assert found["two"] == expected["two"]
    assert encoders[0].num_encoded >= 4


def test_a_prefix_is_shared_with_the_same_image_alone(
    build: Build, family: Family, stock: Any
) -> None:
    engine = build()
    num_cached = []
    for seed in (1, 1, 3):
        one = prompt(TEXT, family.picture(seed, 4, 6), MORE)
        before = engine.stats().num_cached_tokens
        found = answers(engine, [asked("a", one)])["a"]
        assert found == one.continued(stock, NUM_NEW_TOKENS, family.types)
        num_cached.append(engine.stats().num_cached_tokens - before)
    before_image = one.images()[0].start // BLOCK_SIZE * BLOCK_SIZE
    whole = (len(one.token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert num_cached == [0, whole, before_image]


def test_another_text_after_an_image_shares_what_comes_before(
    build: Build, family: Family, stock: Any
) -> None:
    """Of the image, too: the blocks that it fills."""
    engine = build()
    for text in (TEXT, MORE, TEXT[::-1]):
        one = prompt(MORE[:3], family.picture(1, 4, 6), text)
        before = engine.stats().num_cached_tokens
        found = answers(engine, [asked("a", one)])["a"]
        assert found == one.continued(stock, NUM_NEW_TOKENS, family.types)
        shared = engine.stats().num_cached_tokens - before
    assert shared == (len(one.token_ids) - len(TEXT)) // BLOCK_SIZE * BLOCK_SIZE


def test_a_sequence_that_is_resumed_goes_on_with_the_same_tokens(
    build: Build, family: Family, expected: dict[str, list[int]]
) -> None:
    engine = build()
    request = asked("two", conversations(family)["two"])
    resumed = replace(request, resumed_token_ids=tuple(expected["two"][:5]))
    assert answers(engine, [resumed])["two"] == expected["two"][5:]


def test_preempted_sequences_have_the_same_tokens(
    build: Build, family: Family, expected: dict[str, list[int]]
) -> None:
    engine = build(max_batch_total_tokens=128, enable_prefix_caching=False)
    names = [f"{name} {index}" for index in range(2) for name in expected]
    chats = conversations(family)
    found = answers(engine, [asked(name, chats[name[:-2]]) for name in names])
    assert found == {name: expected[name[:-2]] for name in names}


def test_one_image_at_a_time_does_not_hold_up_the_others(
    build: Build, family: Family, encoders: list[ImageEncoder]
) -> None:
    engine = build(max_step_image_tokens=1, max_step_tokens=64)
    chats = [prompt(TEXT, family.picture(seed, 2, 2), TEXT) for seed in range(4)]
    for index, one in enumerate(chats):
        assert engine.add(asked(str(index), one)) is None
    for num_encoded in (1, 2, 3, 4):
        engine.step()
        assert encoders[0].num_encoded == num_encoded


def test_an_image_that_cannot_be_encoded_ends_its_request_alone(
    build: Build, family: Family, expected: dict[str, list[int]]
) -> None:
    engine = build()
    picture = family.picture(1, 4, 6)
    broken = replace(
        picture,
        tensors=picture.tensors | {"pixel_values": picture.tensors["pixel_values"][..., 1:]},
    )
    good, bad = asked("text", conversations(family)["text"]), asked("bad", prompt(broken, TEXT))
    assert engine.add(good) is None
    assert engine.add(bad) is None
    errors, tokens = [], []
    while engine.has_work:
        for output in engine.step().outputs:
            if output.error is not None:
                errors.append(output.request_id)
            elif output.token is not None:
                tokens.append(output.token.token_id)
    assert errors == ["bad"]
    assert tokens == expected["text"]
    engine.check_integrity()


@needs_compiler
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_an_adapter_changes_what_is_said_of_an_image(
    build: Build, family: Family, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    adapted = with_adapter(family.build(), tmp_path)
    digest = read_adapter("one", tmp_path).digest.hex()
    engine = build(adapters=(("one", tmp_path),))
    two = conversations(family)["two"]
    requests = [asked("two", two), replace(asked("adapted", two), adapter=digest)]
    found = answers(engine, requests)
    assert found == {
        "two": expected["two"],
        "adapted": two.continued(adapted, NUM_NEW_TOKENS, family.types),
    }
    assert found["two"] != found["adapted"]


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with a random adapter in its language layers, which is also written."""
    layers = r".*(?:language|text)_model.*\.(q_proj|v_proj|up_proj|down_proj)"
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=layers))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.merge_and_unload()
