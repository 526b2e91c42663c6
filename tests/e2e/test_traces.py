"""One trace from the caller's span through Envoy and the service to the engine's steps."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from service.pb.tokenwire import v1 as pb
from tests.certificates import Authority
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, SERVICE, Stack, running, wait_until
from tests.otlp import (
    Collector,
    Span,
    Tls,
    attributes,
    children,
    grpc_collector,
    http_collector,
    tree,
)

MODEL = "tokenwire/demo"
PHASES: dict[str, Any] = {"validate": {}, "queue": {}, "prefill": {}, "decode": {}}
SERVER, INTERNAL = 2, 1  # kinds of spans in OTLP
ERROR = 2
FLAGS = ("--max-concurrent-requests=2", "--otlp-service-name=box", "--json-output")
PARENT = "b7ad6b7169203331"


@dataclass(frozen=True)
class Traced:
    """A server that sends traces, and where they arrive."""

    stack: Stack
    collector: Collector


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    variables = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=a%20b"}
    log = tmp_path_factory.mktemp("traced") / "log"
    with grpc_collector() as collector:
        flags = (f"--otlp-endpoint={collector.url}", *FLAGS)
        with running(log, *flags, environment={**os.environ, **variables}) as stack:
            yield Traced(stack, collector)


def caller() -> tuple[str, dict[str, str]]:
    """A new trace, and the headers of a caller in it."""
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01", "tracestate": "vendor=1"}
    return trace_id, headers


def the_one(spans: list[Span], parent: Span | str) -> Span:
    """The only span below another."""
    (found,) = children(spans, parent)
    return found


def rest_spans(traced: Traced, trace_id: str, route: str) -> tuple[list[Span], Span]:
    """The spans of a REST request, and the service's own, below those of caller and gateway."""
    spans = traced.collector.trace(trace_id, route)
    traced.collector.wait(
        lambda all_: any(s.trace_id == trace_id and s.service == "box" for s in all_), "the service"
    )
    spans = traced.collector.trace(trace_id, route)
    gateway = the_one(spans, PARENT)
    assert (gateway.name, gateway.service, gateway.kind) == (route, "box.gateway", SERVER)
    server = the_one(spans, gateway)
    assert (server.service, server.kind) == ("box", SERVER)
    return spans, server


def assert_inside(spans: list[Span], parent: Span) -> None:
    """Every span lies in its parent's time, and belongs to its trace and state."""
    for span in children(spans, parent):
        assert parent.start <= span.start <= span.end <= parent.end, (parent.name, span.name)
        assert span.kind == INTERNAL
        assert span.state == "vendor=1"
        assert_inside(spans, span)


CHAT = {
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["never such a text"],
    "model": "anything",
}
PARAMETERS = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_over_rest_is_one_tree(traced: Traced, stream: bool) -> None:
    trace_id, headers = caller()
    body = CHAT | {"stream": stream}
    reply = traced.stack.http.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200
    spans, server = rest_spans(traced, trace_id, "POST /v1/chat/completions")
    assert server.name == f"{SERVICE}/Chat"
    assert server.attributes["rpc.system"] == "grpc"
    assert server.attributes["rpc.service"] == SERVICE
    assert server.attributes["rpc.method"] == "Chat"
    assert server.attributes["rpc.grpc.status_code"] == 0
    assert server.attributes["tokenwire.request_id"] == reply.headers["x-request-id"]
    assert server.attributes["url.path"] == "/v1/chat/completions"
    assert tree(spans, server) == {f"chat {MODEL}": PHASES}
    assert_inside(spans, server)
    chat = the_one(spans, server)
    assert chat.status == server.status == 0
    given = chat.attributes
    assert given["gen_ai.operation.name"] == "chat"
    assert given["gen_ai.provider.name"] == "tokenwire"
    assert given["gen_ai.request.model"] == "anything"
    assert given["gen_ai.response.model"] == MODEL
    assert given["gen_ai.request.max_tokens"] == 5
    assert given["gen_ai.request.temperature"] == pytest.approx(0.5)
    assert given["gen_ai.request.top_p"] == pytest.approx(0.9)
    assert given["gen_ai.request.seed"] == 7
    assert given["gen_ai.request.stop_sequences"] == CHAT["stop"]
    assert given.get("gen_ai.request.stream", False) is stream
    assert given["gen_ai.response.finish_reasons"] == ["length"]
    assert given["gen_ai.usage.output_tokens"] == 5
    if not stream:
        answer = reply.json()
        assert given["gen_ai.response.id"] == answer["id"]
        assert given["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert_latencies_fit(spans, chat)
    assert PROMPT not in str(spans)


def assert_latencies_fit(spans: list[Span], chat: Span) -> None:
    """The attributes say of the phases what their spans do."""
    phases = {span.name: span for span in children(spans, chat)}
    for name, phase in (
        ("time_in_queue", "queue"),
        ("time_in_model_prefill", "prefill"),
        ("time_in_model_decode", "decode"),
    ):
        seconds = (phases[phase].end - phases[phase].start) / 1e9
        assert chat.attributes[f"gen_ai.latency.{name}"] == pytest.approx(seconds, abs=1e-5)
    (event,) = chat.events
    assert event.name == "first_token"
    assert event.at == phases["prefill"].end == phases["decode"].start
    first = (event.at - chat.start) / 1e9
    assert chat.attributes["gen_ai.latency.time_to_first_token"] == pytest.approx(first, abs=1e-5)
    order = [phases[name] for name in ("validate", "queue", "prefill", "decode")]
    assert [span.start for span in order] == sorted(span.start for span in order)


def call(channel: grpc.Channel, name: str, request: Any, headers: dict[str, str]) -> None:
    """Makes a call, and reads it to its end."""
    path = f"/{SERVICE}/{name}"
    metadata = tuple(headers.items())
    if name in ("Generate", "Info"):
        channel.unary_unary(path)(bytes(request), metadata=metadata, timeout=DEADLINE_S)
    else:
        list(channel.unary_stream(path)(bytes(request), metadata=metadata, timeout=DEADLINE_S))


@pytest.mark.parametrize("name", ["Generate", "GenerateStream"])
def test_grpc_callers_without_the_gateway_get_the_same(traced: Traced, name: str) -> None:
    trace_id, headers = caller()
    parameters = pb.GenerateParameters(**PARAMETERS)
    request = pb.GenerateRequest(inputs=PROMPT, parameters=parameters)
    call(traced.stack.direct, name, request, headers)
    spans = traced.collector.trace(trace_id, f"{SERVICE}/{name}")
    server = the_one(spans, PARENT)
    assert (server.kind, server.service) == (SERVER, "box")
    assert tree(spans, server) == {f"text_completion {MODEL}": PHASES}
    assert_inside(spans, server)
    assert_latencies_fit(spans, the_one(spans, server))


def test_grpc_callers_of_the_gateway_have_its_span_in_between(traced: Traced) -> None:
    trace_id, headers = caller()
    call(traced.stack.through_envoy, "Info", pb.InfoRequest(), headers)
    spans, server = rest_spans(traced, trace_id, SERVICE)
    assert server.name == f"{SERVICE}/Info"
    assert children(spans, server) == []


def test_a_grammar_has_a_span_and_texts_of_one_request_are_told_apart(traced: Traced) -> None:
    trace_id, headers = caller()
    grammar = {"type": "json_object", "schema": {"type": "integer", "maximum": 9, "minimum": 0}}
    body = CHAT | {"n": 2, "response_format": {"type": "json_object", "value": grammar["schema"]}}
    reply = traced.stack.http.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    spans, server = rest_spans(traced, trace_id, "POST /v1/chat/completions")
    chat = the_one(spans, server)
    assert chat.attributes["gen_ai.request.choice.count"] == 2
    assert len(chat.attributes["gen_ai.response.finish_reasons"]) == 2
    names = [span.name for span in children(spans, chat)]
    assert sorted(names) == sorted(["validate", "grammar", *["queue", "prefill", "decode"] * 2])
    decodes = [span for span in children(spans, chat) if span.name == "decode"]
    assert sorted(span.attributes["tokenwire.sequence"] for span in decodes) == [0, 1]


def test_without_a_caller_in_a_trace_the_gateway_begins_one(traced: Traced) -> None:
    for headers in ({}, {"traceparent": "rubbish"}, {"traceparent": f"00-{'0' * 32}-{PARENT}-01"}):
        known = {span.trace_id for span in traced.collector.spans}
        reply = traced.stack.http.post(
            "/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 1}}, headers=headers
        )
        assert reply.status_code == 200

        def is_new(span: Span, known: set[str] = known) -> bool:
            return span.trace_id not in known and span.name == "POST /generate"

        spans = traced.collector.wait(lambda all_, f=is_new: any(map(f, all_)), "a new trace")
        (gateway,) = filter(is_new, spans)
        assert gateway.parent_id == ""
        traced.collector.trace(gateway.trace_id, f"{SERVICE}/Generate")
        spans = traced.collector.trace(gateway.trace_id, "POST /generate")
        assert the_one(spans, gateway).name == f"{SERVICE}/Generate"


def test_a_caller_that_is_not_kept_leaves_no_spans(traced: Traced) -> None:
    trace_id, other = secrets.token_hex(16), secrets.token_hex(16)
    for flags, each in (("00", trace_id), ("01", other)):
        headers = {"traceparent": f"00-{each}-{PARENT}-{flags}"}
        traced.stack.http.get("/info", headers=headers)
    rest_spans(traced, other, "GET /info")
    assert not [span for span in traced.collector.spans if span.trace_id == trace_id]


def test_probes_begin_no_traces(traced: Traced) -> None:
    for path in ("/health", "/metrics"):
        traced.stack.http.get(path)
    trace_id, headers = caller()
    traced.stack.http.get("/info", headers=headers)
    rest_spans(traced, trace_id, "GET /info")
    names = {span.name for span in traced.collector.spans}
    assert not [name for name in names if "ealth" in name or "etrics" in name]


def assert_failed(
    traced: Traced, trace_id: str, route: str, phase: str, error: str, code: str
) -> None:
    """The operation failed in a phase; the call has the status that belongs to it."""
    spans, server = rest_spans(traced, trace_id, route)
    operation = the_one(spans, server)
    assert (operation.status, operation.attributes["error.type"]) == (ERROR, error)
    assert server.attributes["rpc.response.status_code"] == code
    phases = children(spans, operation)
    failed = [span.name for span in phases if span.status == ERROR]
    assert failed == ([phase] if phase else [])
    assert [span.attributes["error.type"] for span in phases if span.status == ERROR] == (
        [error] if phase else []
    )
    assert all(span.message == "" for span in spans)  # a message might have content


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "x", "parameters": {"temperature": -1.0}}),
        ("/generate", {"inputs": ["no text"]}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", CHAT | {"temperature": -1.0}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10_000_000}),
        ("/generate_stream", {"inputs": "x", "parameters": {"top_p": 2.0}}),
    ],
)
def test_an_invalid_request_fails_in_its_validation(
    traced: Traced, path: str, body: dict[str, Any]
) -> None:
    trace_id, headers = caller()
    reply = traced.stack.http.post(path, json=body, headers=headers)
    is_stream = path == "/generate_stream"
    assert reply.status_code == (200 if is_stream else 422)
    code = "OK" if is_stream else "INVALID_ARGUMENT"  # whose status is sent before
    assert_failed(traced, trace_id, f"POST {path}", "validate", "validation", code)


def test_a_bad_grammar_fails_in_its_own_stage(traced: Traced) -> None:
    trace_id, headers = caller()
    grammar = {"type": "regex", "value": "("}
    body = {"inputs": "x", "parameters": {"grammar": grammar}}
    assert traced.stack.http.post("/generate", json=body, headers=headers).status_code == 422
    code = "INVALID_ARGUMENT"
    assert_failed(traced, trace_id, "POST /generate", "grammar", "validation", code)


def test_a_request_for_more_than_there_is_room_for_is_refused_unread(traced: Traced) -> None:
    trace_id, headers = caller()
    reply = traced.stack.http.post("/v1/chat/completions", json=CHAT | {"n": 3}, headers=headers)
    assert reply.status_code == 429
    code = "RESOURCE_EXHAUSTED"
    assert_failed(traced, trace_id, "POST /v1/chat/completions", "", "overloaded", code)


def test_a_caller_that_leaves_cancels_what_goes_on(traced: Traced) -> None:
    left, headers = caller()
    body = {"inputs": PROMPT, "parameters": ENDLESS}
    with (
        httpx.Client(base_url=traced.stack.url, timeout=DEADLINE_S) as client,
        client.stream("POST", "/generate_stream", json=body, headers=headers) as reply,
    ):
        next(reply.iter_raw())
    route = "POST /generate_stream"
    assert_failed(traced, left, route, "decode", "cancelled", "CANCELLED")


def test_what_only_the_gateway_sees_has_its_span_alone(traced: Traced) -> None:
    trace_id, headers = caller()
    assert traced.stack.http.get("/nowhere", headers=headers).status_code == 404
    (span,) = traced.collector.trace(trace_id, "unknown path")
    assert span.attributes["http.status_code"] == "404"


def test_headers_of_exports_are_sent_by_both(traced: Traced) -> None:
    agents = {
        headers["user-agent"].split("/")[0]
        for headers in traced.collector.headers
        if headers["x-key"] == "a b"
    }
    assert len(agents) == 2, agents
    assert len({headers["x-key"] for headers in traced.collector.headers}) == 1


def test_a_lost_engine_leaves_events(traced: Traced) -> None:
    stack = traced.stack
    trace_id, headers = caller()
    engine = stack.child("engine")
    body = {"inputs": PROMPT, "parameters": ENDLESS}
    with (
        stack.losing_engine(),
        stack.http.stream("POST", "/generate_stream", json=body, headers=headers) as reply,
    ):
        chunks = reply.iter_raw()
        next(chunks)
        engine.kill()
        for _ in chunks:
            pass
    spans, server = rest_spans(traced, trace_id, "POST /generate_stream")
    operation = the_one(spans, server)
    assert operation.status == 0
    names = [event.name for event in operation.events]
    assert names == ["first_token", "engine_lost", "resumed"]


def test_lines_of_a_call_have_the_id_of_its_trace(traced: Traced) -> None:
    trace_id, headers = caller()
    traced.stack.http.post("/generate", json={"inputs": "x"}, headers=headers)
    wait_until(lambda: f'"trace_id": "{trace_id}"' in traced.stack.log(), "a line of the call")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs the certificates of collectors and of their clients."""
    return Authority(tmp_path_factory.mktemp("authority"))


def secured(authority: Authority, collector: Collector) -> dict[str, str]:
    """The variables that send everything to a collector which asks for a certificate."""
    client = authority.issue("client", "DNS:client")
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(authority.certificate),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(client.certificate),
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(client.key),
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20secret",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    return {**os.environ, **variables}


def test_all_goes_over_http_and_tls_with_content_if_that_is_asked_for(
    authority: Authority, tmp_path: Path
) -> None:
    """The collector is known by its address; metrics that are left are pushed at the end."""
    own = authority.issue("collector", "IP:127.0.0.1")
    with http_collector(tls=Tls(own, authority.certificate)) as collector:
        environment = secured(authority, collector) | {
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test,service.name=other",
        }
        with running(tmp_path / "log", "--otlp-content", environment=environment) as stack:
            trace_id, headers = caller()
            reply = stack.http.post("/v1/chat/completions", json=CHAT, headers=headers)
            collector.trace(trace_id, f"{SERVICE}/Chat")
            spans = collector.trace(trace_id, "POST /v1/chat/completions")
            assert "secret" not in stack.log()
    assert {span.service for span in spans} == {"other", "other.gateway"}
    assert {span.resource["deployment.environment"] for span in spans} == {"test"}
    assert {headers["authorization"] for headers in collector.headers} == {"Bearer secret"}
    (chat,) = (span for span in spans if span.name == f"chat {MODEL}")
    text = reply.json()["choices"][0]["message"]["content"]
    assert chat.attributes["gen_ai.input.messages"].count(PROMPT) == 1
    assert text in chat.attributes["gen_ai.output.messages"].encode().decode("unicode_escape")
    (duration,) = collector.points("other", "gen_ai.server.request.duration")
    assert (duration.count, attributes(duration)["gen_ai.operation.name"]) == (1, "chat")
    (first,) = collector.points("other", "gen_ai.server.time_to_first_token")
    assert attributes(first) == attributes(duration)
    assert 0 < first.sum <= duration.sum


@pytest.fixture(scope="module")
def small(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """A server whose cache holds 256 tokens; its collector is known by name, over gRPC and TLS."""
    own = authority.issue("collector", "DNS:localhost")
    flags = ("--max-total-tokens=192", "--max-batch-total-tokens=256", "--otlp-service-name=box")
    with grpc_collector(tls=Tls(own, authority.certificate)) as collector:
        environment = secured(authority, collector) | {"OTEL_METRIC_EXPORT_INTERVAL": "100"}
        log = tmp_path_factory.mktemp("small") / "log"
        with running(log, *flags, environment=environment) as stack:
            yield Traced(stack, collector)


def test_all_goes_over_grpc_and_tls_under_one_name(small: Traced) -> None:
    trace_id, headers = caller()
    small.stack.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    rest_spans(small, trace_id, "POST /v1/chat/completions")
    metrics = small.collector.metrics
    pushed = ("box", "gen_ai.server.request.duration")
    small.collector.wait(lambda _: pushed in metrics, "a metric")
    assert {name for name, _ in metrics} == {"box"}
    assert {headers["authorization"] for headers in small.collector.headers} == {"Bearer secret"}


def preempted(small: Traced) -> dict[str, bool]:
    """Lets texts of both faces compete for the cache; returns their traces, true for REST's."""
    parameters = ENDLESS | {"max_new_tokens": 150, "ignore_eos": True}
    body = {"inputs": PROMPT, "parameters": parameters}
    api = ReflectionClient(small.stack.direct)
    traces: dict[str, bool] = {}
    with ThreadPoolExecutor(8) as pool:
        calls = []
        for number in range(8):
            trace_id, headers = caller()
            traces[trace_id] = number % 2 == 0
            calls.append(
                pool.submit(small.stack.http.post, "/generate", json=body, headers=headers)
                if traces[trace_id]
                else pool.submit(api.call, "Generate", body, metadata=headers)
            )
        for call_ in calls:
            call_.result()
    return traces


def test_a_preempted_text_has_events_in_its_own_span(small: Traced) -> None:
    traces: dict[str, bool] = {}
    while not small.stack.metric("tokenwire_preemptions_total"):
        traces |= preempted(small)
    events: list[str] = []
    for trace_id, is_rest in traces.items():
        if is_rest:
            spans, server = rest_spans(small, trace_id, "POST /generate")
        else:
            spans = small.collector.trace(trace_id, f"{SERVICE}/Generate")
            server = the_one(spans, PARENT)
        operation = the_one(spans, server)
        assert operation.name == f"text_completion {MODEL}"
        assert tree(spans, operation) == PHASES
        assert [span for span in spans if span.events and span is not operation] == []
        of_it = [event.name for event in operation.events if event.name != "first_token"]
        assert of_it == ["preempted", "resumed"] * (len(of_it) // 2)
        times = [event.at for event in operation.events]
        assert [operation.start, *times, operation.end] == sorted(
            [operation.start, *times, operation.end]
        )
        events += of_it
    assert events.count("preempted") == small.stack.metric("tokenwire_preemptions_total")
