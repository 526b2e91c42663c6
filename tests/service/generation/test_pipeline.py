"""The order of a request's stages, the permits it holds, and what is counted."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.protocol.request import FinishReason
from service.errors import ErrorKind, ServiceError
from service.generation.admission import Admission
from service.generation.generator import Generator
from service.generation.metrics import Metrics
from service.generation.parameters import Parameters
from service.generation.pipeline import Pipeline
from service.generation.validation import Validator
from tests.service.fakes import (
    LIMITS,
    NO_GRAMMARS,
    FakeEngineClient,
    Script,
    WordTokenizer,
    eventually,
    sample,
    script,
    simple_tokenizer,
    step,
)

WORDS = WordTokenizer("a", "b", "c", "<eos>")
ENDED = step(1, finish=FinishReason.LENGTH)
BEST_OF_2 = Parameters(best_of=2, do_sample=True)
TOP_K_0 = Parameters(top_k=0)


class Bench:
    """A pipeline with room for some, over a script."""

    def __init__(self, play: Script, room: int = 2) -> None:
        self.client = FakeEngineClient(play)
        self.admission = Admission(room)
        self.metrics = Metrics(LIMITS)
        self.pipeline = Pipeline(
            self.admission,
            Validator(replace(LIMITS, max_best_of=3), simple_tokenizer([0, 1]), NO_GRAMMARS),  # type: ignore[arg-type]
            Generator(self.client, WORDS),  # type: ignore[arg-type]
            self.metrics,
        )

    async def run(self, parameters: Parameters | None = None) -> str:
        return (await self.pipeline.run("ab", parameters or Parameters(), 0.0)).text

    async def stream(self, parameters: Parameters | None = None) -> list[str]:
        events = self.pipeline.stream("ab", parameters or Parameters(), 0.0)
        return [event.token.text async for event in events]

    async def refusal(
        self, parameters: Parameters | None = None, *, stream: bool = False
    ) -> ServiceError:
        with pytest.raises(ServiceError) as refused:
            await (self.stream(parameters) if stream else self.run(parameters))
        return refused.value

    def count(self, series: str) -> float:
        return sample(self.metrics.exposition(), f"tgi_request_{series}")

    def assert_idle(self) -> None:
        assert self.admission.num_active == 0
        assert self.client.num_open == 0


async def test_a_text_is_generated_and_counted() -> None:
    bench = Bench(script(step(0), ENDED))
    assert await bench.run() == "ab"
    bench.assert_idle()
    counts = [bench.count(name) for name in ("count", "success", "input_length_sum")]
    assert counts == [1, 1, 2]
    assert bench.count("max_new_tokens_sum") == 100
    assert bench.count("generated_tokens_sum") == 2


async def test_a_stream_is_generated_and_counted() -> None:
    bench = Bench(script(step(0), ENDED))
    assert await bench.stream() == ["a", "b"]
    bench.assert_idle()
    assert [bench.count(name) for name in ("count", "success")] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_server_answers_before_it_validates(stream: bool) -> None:
    bench = Bench(script(ENDED), room=1)
    with bench.admission.permit():
        error = await bench.refusal(TOP_K_0, stream=stream)
    assert error.kind is ErrorKind.OVERLOADED
    assert bench.count('failure{err="overloaded"}') == 1
    assert bench.client.requests == []


@pytest.mark.parametrize(
    ("parameters", "stream"),
    [(Parameters(best_of=4), False), (Parameters(best_of=2), True)],
)
async def test_what_an_endpoint_cannot_do_is_said_even_by_a_full_server(
    parameters: Parameters, stream: bool
) -> None:
    bench = Bench(script(ENDED), room=1)
    with bench.admission.permit():
        assert (await bench.refusal(parameters, stream=stream)).kind is ErrorKind.VALIDATION


async def test_best_of_takes_a_permit_for_each_candidate() -> None:
    bench = Bench(script(ENDED), room=2)
    with bench.admission.permit():
        assert (await bench.refusal(BEST_OF_2)).kind is ErrorKind.OVERLOADED
    assert await bench.run(BEST_OF_2) == "b"
    assert len(bench.client.requests) == 2
    bench.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_broken_rule_gives_the_permit_back(stream: bool) -> None:
    bench = Bench(script(ENDED))
    error = await bench.refusal(TOP_K_0, stream=stream)
    assert error.field == "parameters.top_k"
    assert bench.count('failure{err="validation"}') == 1
    assert bench.count("max_new_tokens_count") == 0
    bench.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("play", "reason"),
    [
        (script(step(0), step(error="bad")), "generation"),
        (script(step(0)), "incomplete"),
        (script(ServiceError(ErrorKind.UNHEALTHY, "unhealthy")), "generation"),
    ],
    ids=["engine", "incomplete", "unhealthy"],
)
async def test_a_failure_gives_the_permit_back(play: Script, reason: str, stream: bool) -> None:
    bench = Bench(play)
    await bench.refusal(stream=stream)
    assert bench.count(f'failure{{err="{reason}"}}') == 1
    assert bench.count("success") == 0
    bench.assert_idle()


async def test_a_stream_that_nobody_reads_to_the_end_is_dropped() -> None:
    bench = Bench(script(step(0), asyncio.Event()))
    events = bench.pipeline.stream("ab", Parameters(), 0.0)
    await anext(events)
    assert bench.admission.num_active == 1
    await events.aclose()
    assert bench.count('failure{err="dropped"}') == 1
    bench.assert_idle()


@pytest.mark.parametrize("parameters", [Parameters(), BEST_OF_2])
async def test_a_cancelled_run_is_dropped(parameters: Parameters) -> None:
    bench = Bench(script(asyncio.Event()))
    task = asyncio.create_task(bench.run(parameters))
    await eventually(lambda: bench.client.num_open == (parameters.best_of or 1))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.count('failure{err="dropped"}') == 1
    bench.assert_idle()


async def test_a_stream_that_was_not_begun_holds_nothing() -> None:
    bench = Bench(script(ENDED))
    await bench.pipeline.stream("ab", Parameters(), 0.0).aclose()
    bench.assert_idle()
    assert bench.count("count") == 0


async def test_a_server_that_shuts_down_finishes_what_runs() -> None:
    go_on = asyncio.Event()
    bench = Bench(script(step(0), go_on, ENDED))
    events = bench.pipeline.stream("ab", Parameters(), 0.0)
    texts = [(await anext(events)).token.text]
    bench.admission.close()
    assert (await bench.refusal()).kind is ErrorKind.UNHEALTHY
    assert (await bench.refusal(stream=True)).kind is ErrorKind.UNHEALTHY
    go_on.set()
    texts += [event.token.text async for event in events]
    assert texts == ["a", "b"]
    bench.assert_idle()
