"""The spans of calls to a service over a scripted engine, by every way in which they can end."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from service.access.keys import key_line, make_key, parse_keys
from service.api.authentication import Authenticator
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE
from service.tracing.tracer import CallTracer
from tests.service.api.harness import Service, generate_request, streamed
from tests.service.fakes import eventually, script, serving, step

OPERATION = "text_completion model"
GENERATE = f"{SERVICE}/Generate"


class Traced(Service):
    """A service whose spans stay in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        tracer = self.provider.get_tracer("test")
        self.tracer = CallTracer(tracer, tracer, "model", captures_content=False)

    async def spans(self, name: str) -> dict[str, ReadableSpan]:
        """All spans by their names, once that of the call is there."""
        await eventually(lambda: any(s.name == name for s in self.exporter.get_finished_spans()))
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
async def traced() -> AsyncGenerator[Traced]:
    service = Traced()
    async with service.running(tracer=service.tracer):
        yield service


def assert_ended(
    spans: dict[str, ReadableSpan], name: str, code: str, error: str, *, server_failed: bool = False
) -> None:
    """The call has a status, and the generation an error, or none."""
    call, operation = spans[name], spans[OPERATION]
    assert call.attributes is not None
    assert operation.attributes is not None
    assert call.attributes["rpc.response.status_code"] == code
    assert call.status.status_code is (StatusCode.ERROR if server_failed else StatusCode.UNSET)
    assert operation.attributes.get("error.type", "") == error
    is_error = operation.status.status_code is StatusCode.ERROR
    assert is_error is bool(error)
    assert operation.parent == call.context
    assert call.status.description is operation.status.description is None


@pytest.mark.parametrize("rest", [False, True])
async def test_a_generation(traced: Traced, rest: bool) -> None:
    await traced.ask("Generate", generate_request({"max_new_tokens": 2}), rest=rest)
    assert_ended(await traced.spans(GENERATE), GENERATE, "OK", "")


async def test_an_error_of_the_engine(traced: Traced) -> None:
    traced.use_script(script(step(error="broken")))
    await traced.ask("Generate", generate_request(), rest=False)
    assert_ended(await traced.spans(GENERATE), GENERATE, "ABORTED", "generation")


async def test_an_error_within_a_rest_stream_is_told_by_the_generation_alone(
    traced: Traced,
) -> None:
    traced.use_script(script(step(5), step(error="broken")))
    await traced.ask("GenerateStream", streamed("GenerateStream"), rest=True)
    name = f"{SERVICE}/GenerateStream"
    assert_ended(await traced.spans(name), name, "OK", "generation")


async def test_a_defect_is_the_servers_failure_and_its_text_stays_inside(traced: Traced) -> None:
    traced.use_script(script(RuntimeError("a secret")))
    await traced.ask("Generate", generate_request(), rest=False)
    spans = await traced.spans(GENERATE)
    assert_ended(spans, GENERATE, "INTERNAL", "internal", server_failed=True)
    assert "secret" not in "".join(span.to_json() for span in spans.values())


async def test_too_many_requests(traced: Traced) -> None:
    with traced.full():
        await traced.ask("Generate", generate_request(), rest=False)
    spans = await traced.spans(GENERATE)
    assert_ended(spans, GENERATE, "RESOURCE_EXHAUSTED", "overloaded")
    assert spans.keys() == {GENERATE, OPERATION}


async def test_what_generates_nothing_has_one_span(traced: Traced) -> None:
    await traced.ask("Tokenize", pb.TokenizeRequest(inputs="x"), rest=False)
    await traced.ask("Health", pb.HealthRequest(), rest=False)
    assert (await traced.spans(f"{SERVICE}/Tokenize")).keys() == {f"{SERVICE}/Tokenize"}


async def test_a_call_without_a_key_has_one_span() -> None:
    service = Traced()
    handlers = service.handlers()
    keys = Authenticator(lambda: parse_keys(key_line("alice", make_key())))
    async with serving(handlers, authenticator=keys, tracer=service.tracer) as service.channel:
        await service.ask("Generate", generate_request(), rest=False)
    spans = await service.spans(GENERATE)
    assert spans.keys() == {GENERATE}
    attributes = spans[GENERATE].attributes
    assert attributes is not None
    assert attributes["error.type"] == "UNAUTHENTICATED"
