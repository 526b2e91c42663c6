"""Random loads: requests that arrive and are aborted at any step, and an engine's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from engine.engine import Engine
from engine.protocol.request import Request, SamplingParams
from tests.engine.fakes import VOCAB_SIZE

_TOKENS = st.integers(0, VOCAB_SIZE - 3)
_SAMPLING = st.one_of(
    st.just({}),
    st.builds(lambda seed: {"do_sample": True, "seed": seed}, st.integers(0, 2**64 - 1)),
    st.just({"do_sample": True, "seed": 7, "top_k": 3, "temperature": 1.5}),
    st.just({"repetition_penalty": 1.3}),
    st.just({"frequency_penalty": 0.7}),
    st.just({"repetition_penalty": 0.8, "frequency_penalty": -0.5, "top_n_tokens": 2}),
    st.just({"watermark": True}),  # needs sampled tokens: no running ahead
)


@dataclass(frozen=True)
class Arrival:
    """A request that is added `after` some steps.

    It may be aborted once it has `leaves_after` tokens.
    """

    request: Request
    after: int
    leaves_after: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    result = []
    for number in range(draw(st.integers(1, 6))):
        request = Request(
            request_id=f"{number}",
            prompt_token_ids=tuple(draw(st.lists(_TOKENS, min_size=1, max_size=14))),
            max_new_tokens=draw(st.integers(1, 12)),
            sampling=SamplingParams(**draw(_SAMPLING)),
            eos_token_ids=frozenset(draw(st.lists(_TOKENS, max_size=4))),
            prompt_logprobs=draw(st.booleans()),
        )
        leaves = draw(st.none() | st.integers(0, 12))
        result.append(Arrival(request, draw(st.integers(0, 10)), leaves))
    return result


def run_load(engine: Engine, load: list[Arrival]) -> dict[str, list[Any]]:
    """Runs a load; returns each request's tokens, finish reasons and errors in order."""
    found: dict[str, list[Any]] = {arrival.request.request_id: [] for arrival in load}
    tokens_of: dict[str, int] = dict.fromkeys(found, 0)
    step = 0
    waiting = sorted(load, key=lambda arrival: arrival.after)
    abort_after = {a.request.request_id: a.leaves_after for a in load if a.leaves_after is not None}
    while waiting or engine.has_work:
        while waiting and waiting[0].after <= step:
            assert engine.add(waiting.pop(0).request) is None
        for output in engine.step().outputs:
            name = output.request_id
            found[name].append((output.token, output.finish_reason, output.error))
            tokens_of[name] += output.token is not None
            if name in abort_after and tokens_of[name] >= abort_after[name]:
                engine.abort(name)
        engine.check_integrity()
        step += 1
    return found


def assert_same_answers(
    load: list[Arrival], expected: dict[str, list[Any]], actual: dict[str, list[Any]]
) -> None:
    """Asserts that tokens are equal; aborted requests may have a different number of them."""
    leaving = {a.request.request_id for a in load if a.leaves_after is not None}
    for name, events in expected.items():
        texts = [[item for item in found if item[0]] for found in (events, actual[name])]
        size = min(map(len, texts)) if name in leaving else len(texts[0])
        assert texts[1][:size] == texts[0][:size]
        assert name in leaving or len(texts[1]) == size
