"""The order of a request's stages, the permits it holds, and what is counted."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.protocol.request import FinishReason
from service.call_record import begin_record
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


class ScriptedPipeline:
    """A pipeline over a scripted engine, with a number of permits."""

    def __init__(self, engine_script: Script, permits: int = 2) -> None:
        self.client = FakeEngineClient(engine_script)
        self.admission = Admission(permits)
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
    scripted = ScriptedPipeline(script(step(0), ENDED))
    assert await scripted.run() == "ab"
    scripted.assert_idle()
    counts = [scripted.count(name) for name in ("count", "success", "input_length_sum")]
    assert counts == [1, 1, 2]
    assert scripted.count("max_new_tokens_sum") == 100
    assert scripted.count("generated_tokens_sum") == 2


async def test_a_stream_is_generated_and_counted() -> None:
    scripted = ScriptedPipeline(script(step(0), ENDED))
    assert await scripted.stream() == ["a", "b"]
    scripted.assert_idle()
    assert [scripted.count(name) for name in ("count", "success")] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_server_answers_before_it_validates(stream: bool) -> None:
    scripted = ScriptedPipeline(script(ENDED), permits=1)
    with scripted.admission.permit():
        error = await scripted.refusal(TOP_K_0, stream=stream)
    assert error.kind is ErrorKind.OVERLOADED
    assert scripted.count('failure{err="overloaded"}') == 1
    assert scripted.client.requests == []


@pytest.mark.parametrize(
    ("parameters", "stream"),
    [(Parameters(best_of=4), False), (Parameters(best_of=2), True)],
)
async def test_unsupported_parameters_are_reported_even_by_a_full_server(
    parameters: Parameters, stream: bool
) -> None:
    scripted = ScriptedPipeline(script(ENDED), permits=1)
    with scripted.admission.permit():
        assert (await scripted.refusal(parameters, stream=stream)).kind is ErrorKind.VALIDATION


async def test_best_of_takes_a_permit_for_each_candidate() -> None:
    scripted = ScriptedPipeline(script(ENDED), permits=2)
    with scripted.admission.permit():
        assert (await scripted.refusal(BEST_OF_2)).kind is ErrorKind.OVERLOADED
    assert await scripted.run(BEST_OF_2) == "b"
    assert len(scripted.client.requests) == 2
    scripted.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_invalid_request_returns_its_permit(stream: bool) -> None:
    scripted = ScriptedPipeline(script(ENDED))
    error = await scripted.refusal(TOP_K_0, stream=stream)
    assert error.field == "parameters.top_k"
    assert scripted.count('failure{err="validation"}') == 1
    assert scripted.count("max_new_tokens_count") == 0
    scripted.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("engine_script", "reason"),
    [
        (script(step(0), step(error="bad")), "generation"),
        (script(step(0)), "incomplete"),
        (script(ServiceError(ErrorKind.UNHEALTHY, "unhealthy")), "generation"),
    ],
    ids=["engine", "incomplete", "unhealthy"],
)
async def test_a_failed_generation_returns_its_permit(
    engine_script: Script, reason: str, stream: bool
) -> None:
    scripted = ScriptedPipeline(engine_script)
    await scripted.refusal(stream=stream)
    assert scripted.count(f'failure{{err="{reason}"}}') == 1
    assert scripted.count("success") == 0
    scripted.assert_idle()


async def test_a_stream_that_is_closed_early_counts_as_dropped() -> None:
    scripted = ScriptedPipeline(script(step(0), asyncio.Event()))
    events = scripted.pipeline.stream("ab", Parameters(), 0.0)
    await anext(events)
    assert scripted.admission.num_active == 1
    await events.aclose()
    assert scripted.count('failure{err="dropped"}') == 1
    scripted.assert_idle()


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_that_is_closed_at_its_last_token_is_a_success_and_nothing_else(
    n: int,
) -> None:
    scripted = ScriptedPipeline(script(step(0), ENDED))
    events = scripted.pipeline.stream("ab", Parameters(), 0.0, n)
    for _ in range(2 * n):
        last = await anext(events)
    assert last.generation is not None
    scripted.assert_idle()
    await events.aclose()
    counts = [scripted.count(name) for name in ("count", "success", 'failure{err="dropped"}')]
    assert counts == [1, 1, 0]


async def test_a_stream_that_only_waits_to_be_read_is_not_ended_by_its_id() -> None:
    scripted = ScriptedPipeline(script(step(0), ENDED))
    begin_record("the-call")
    events = scripted.pipeline.stream("ab", Parameters(), 0.0)
    counts = []
    async for _ in events:
        counts.append(scripted.pipeline.abort("the-call", None))
    assert counts == [1, 0]


@pytest.mark.parametrize("parameters", [Parameters(), BEST_OF_2])
async def test_a_cancelled_run_counts_as_dropped(parameters: Parameters) -> None:
    scripted = ScriptedPipeline(script(asyncio.Event()))
    task = asyncio.create_task(scripted.run(parameters))
    await eventually(lambda: scripted.client.num_open == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert scripted.count('failure{err="dropped"}') == 1
    scripted.assert_idle()


async def test_a_stream_that_was_never_started_holds_no_permit() -> None:
    scripted = ScriptedPipeline(script(ENDED))
    await scripted.pipeline.stream("ab", Parameters(), 0.0).aclose()
    scripted.assert_idle()
    assert scripted.count("count") == 0


async def test_a_server_that_shuts_down_finishes_running_requests() -> None:
    go_on = asyncio.Event()
    scripted = ScriptedPipeline(script(step(0), go_on, ENDED))
    events = scripted.pipeline.stream("ab", Parameters(), 0.0)
    texts = [(await anext(events)).token.text]
    scripted.admission.close()
    assert (await scripted.refusal()).kind is ErrorKind.UNHEALTHY
    assert (await scripted.refusal(stream=True)).kind is ErrorKind.UNHEALTHY
    with pytest.raises(ServiceError, match="unhealthy"):  # before the headers of a stream
        scripted.pipeline.check_stream(Parameters())
    go_on.set()
    texts += [event.token.text async for event in events]
    assert texts == ["a", "b"]
    scripted.assert_idle()
