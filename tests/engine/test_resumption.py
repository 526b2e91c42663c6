"""A sampled text that new engines continue is the unbroken text: tokens and log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.build import build_engine
from engine.engine import Engine
from engine.grammar.backend_llguidance import json_source
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request, SamplingParams, Token
from tests.engine.grammar.grammars import encode, eos_of
from tests.engine.native import needs_compiler, threads
from tests.paths import DEMO_MODEL

pytestmark = needs_compiler

NUM_TOKENS = 40
# Forced tokens, such as names of keys, and free ones.
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["city", "population"],
    "additionalProperties": False,
}
_TEXTS = ("What is the capital of France?", "1, 2, 3, 1, 2, 3, 1, 2,", "Tell me. " * 40)
PROMPTS = tuple(tuple(encode(text)) for text in _TEXTS)  # the last is longer than some chunks
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(do_sample=True, seed=3, top_n_tokens=3),
    SamplingParams(do_sample=True, seed=2**63, temperature=1.7),
    SamplingParams(do_sample=True, seed=5, temperature=0.8, top_k=40, top_p=0.9),
    SamplingParams(do_sample=True, seed=6, typical_p=0.9, repetition_penalty=1.2),
    SamplingParams(do_sample=True, seed=7, min_p=0.02, frequency_penalty=0.5),
    SamplingParams(do_sample=True, seed=8, watermark=True),
)


@dataclass(frozen=True, slots=True)
class Life:
    """One engine: its settings, and how many other requests it computes at the same time."""

    settings: dict[str, Any]
    company: int


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and the engines that generate a part of it each."""

    quantize: str | None
    prompt: tuple[int, ...]
    sampling: SamplingParams
    has_grammar: bool
    cuts: list[int]
    lives: list[Life]

    @property
    def request(self) -> Request:
        return Request(
            request_id="wanted",
            prompt_token_ids=self.prompt,
            max_new_tokens=NUM_TOKENS,
            sampling=self.sampling,
            grammar=json_source(_SCHEMA) if self.has_grammar else "",
            eos_token_ids=eos_of("demo") if self.has_grammar else frozenset(),
        )


_lives = st.builds(
    Life,
    settings=st.fixed_dictionaries(
        {
            "max_step_tokens": st.sampled_from([7, 33, 256, 2048]),
            "max_chunk_tokens": st.sampled_from([1, 5, 64, 2048]),
            "block_size": st.sampled_from([8, 16, 32]),
            "speculate": st.sampled_from([0, 0, 3]),
            "num_threads": st.sampled_from([1, 2]),
            "graph_sizes": st.sampled_from([(), (1, 2, 4, 8)]),
            "enable_prefix_caching": st.booleans(),
            "run_ahead": st.booleans(),
        }
    ),
    company=st.integers(0, 4),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    cuts = draw(st.lists(st.integers(1, NUM_TOKENS - 1), min_size=1, max_size=3, unique=True))
    return Case(
        quantize=draw(st.sampled_from([None, None, "int8", "int4"])),
        prompt=draw(st.sampled_from(PROMPTS)),
        sampling=draw(st.sampled_from(SAMPLINGS)),
        has_grammar=draw(st.booleans()),
        cuts=sorted(cuts),
        lives=draw(st.lists(_lives, min_size=len(cuts) + 1, max_size=len(cuts) + 1)),
    )


def make_engine(quantize: str | None, options: dict[str, Any]) -> Engine:
    config = EngineConfig(
        model_id=str(DEMO_MODEL),
        socket_path=Path("unused"),
        device="cpu",
        quantize=quantize,
        max_batch_total_tokens=8192,
        **options,
    )
    return build_engine(config)[0]


def others(life: Life, prompt: tuple[int, ...]) -> list[Request]:
    """Requests beside the wanted one; every second begins with the same prompt."""
    return [
        Request(
            request_id=f"other {number}",
            prompt_token_ids=(prompt if number % 2 else ()) + (300 + number,) * (3 + 20 * number),
            max_new_tokens=9 * (number + 1),
            sampling=SamplingParams(do_sample=True, seed=number),
        )
        for number in range(life.company)
    ]


def generate(engine: Engine, wanted: Request, company: list[Request], count: int) -> list[Token]:
    """The next `count` tokens; what the engine generates after them is lost with it."""
    tokens: list[Token] = []
    waiting, is_done = [*company[:2], wanted, *company[2:]], False
    while len(tokens) < count and not is_done:
        if waiting:
            assert engine.add(waiting.pop(0)) is None
        for output in engine.step().outputs:
            assert output.error is None
            if output.request_id == "wanted":
                tokens += [output.token] if output.token is not None else []
                is_done = is_done or output.is_last
    return tokens[:count]


@cache
def unbroken(
    quantize: str | None, prompt: tuple[int, ...], sampling: SamplingParams, has_grammar: bool
) -> list[Token]:
    """All tokens of a request that has an engine for itself."""
    request = Case(quantize, prompt, sampling, has_grammar, [], []).request
    return generate(make_engine(quantize, {"num_threads": 1}), request, [], NUM_TOKENS)


def resumed(case: Case) -> list[Token]:
    """The tokens of the engines, each of which continues what those before it have generated."""
    tokens: list[Token] = []
    for life, (low, high) in zip(case.lives, pairwise([0, *case.cuts, NUM_TOKENS]), strict=True):
        if len(tokens) < low:
            break  # the text has ended
        ids = tuple(token.token_id for token in tokens)
        request = replace(case.request, resumed_token_ids=ids)
        engine = make_engine(case.quantize, life.settings)
        tokens += generate(engine, request, others(life, case.prompt), high - low)
    return tokens


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_resumed_texts_are_the_unbroken_ones_bit_for_bit(case: Case) -> None:
    with threads(1):  # building engines changes their number
        expected = unbroken(case.quantize, case.prompt, case.sampling, case.has_grammar)
        assert resumed(case) == expected


@pytest.mark.parametrize("sampling", SAMPLINGS[1:3], ids=["temperature 1", "temperature 1.7"])
def test_a_text_may_be_cut_every_few_tokens(sampling: SamplingParams) -> None:
    """A new engine for each part: every key and value so far is computed again each time."""
    cuts = [*range(2, NUM_TOKENS, 3)]
    lives = [Life({"num_threads": 1, "max_step_tokens": 1 + 5 * cut}, 0) for cut in [0, *cuts]]
    case = Case(None, PROMPTS[0], sampling, False, cuts, lives)
    with threads(1):
        assert resumed(case) == unbroken(None, PROMPTS[0], sampling, has_grammar=False)
