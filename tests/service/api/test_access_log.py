"""Every call has an id, which its caller gets back, and a log line without its content."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import pytest
from grpc import aio

from service.call_record import REQUEST_ID_HEADER, CallFilter
from service.errors import ErrorKind, ServiceError
from service.log_lines import JsonFormatter, TextFormatter, text_formatter
from service.pb.google.api import HttpBody
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE
from tests.service.api.harness import Service, generate_request
from tests.service.fakes import (
    demo_ids,
    eventually,
    script,
    step,
    trailers,
)

GENERATE = f"/{SERVICE}/Generate"
SECRET = "a secret prompt"


@pytest.fixture
async def service() -> AsyncGenerator[Service]:
    async with Service().running(access_log=True) as service:
        yield service


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """The records of the access log so far, as a handler of the command sees them."""
    caplog.set_level(logging.INFO, "service.access")
    caplog.handler.addFilter(CallFilter())
    return lambda: caplog.records


async def generate(service: Service, given: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Initial and trailing metadata of a call."""
    metadata = None if given is None else [(REQUEST_ID_HEADER, given)]
    call = service.channel.unary_unary(GENERATE, bytes, pb.GenerateResponse.parse)(
        pb.GenerateRequest(inputs=SECRET, parameters=pb.GenerateParameters(max_new_tokens=3)),
        metadata=metadata,
    )
    await call
    return dict(await call.initial_metadata()), dict(await call.trailing_metadata())


async def test_the_callers_id_comes_back_and_stands_in_the_log(
    service: Service, lines: Callable[[], list[logging.LogRecord]]
) -> None:
    initial, trailing = await generate(service, "my-id/7")
    assert initial[REQUEST_ID_HEADER] == trailing[REQUEST_ID_HEADER] == "my-id/7"
    await eventually(lambda: bool(lines()))
    (line,) = lines()
    assert line.request_id == "my-id/7"  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [None, "x" * 129, "two words"])
async def test_an_id_is_made_where_there_is_none_to_use(
    service: Service, given: str | None
) -> None:
    _, trailing = await generate(service, given)
    assert re.fullmatch("[0-9a-f]{32}", trailing[REQUEST_ID_HEADER])


async def test_a_failed_call_has_its_id_too(service: Service) -> None:
    answer = await service.ask("Generate", generate_request({"top_p": 1.0}), rest=False)
    assert re.fullmatch("[0-9a-f]{32}", trailers(answer.failure)[REQUEST_ID_HEADER])


async def test_a_line_says_how_a_call_ended_and_not_what_was_in_it(
    service: Service, lines: Callable[[], list[logging.LogRecord]]
) -> None:
    await generate(service, "id")
    await eventually(lambda: bool(lines()))
    (line,) = lines()
    text = TextFormatter("%(message)s").format(line)
    found = re.fullmatch(
        r"Generate (\S+) OK \d+\.\d{3} s, tokens (\d+) in 3 out \[id 127\.0\.0\.1\]", text
    )
    assert found is not None
    assert found[1] == GENERATE
    assert int(found[2]) > 3
    fields = json.loads(JsonFormatter().format(line))
    assert (fields["request_id"], fields["caller"]) == ("id", "127.0.0.1")
    assert (fields["path"], fields["status"], fields["generated_tokens"]) == (GENERATE, "OK", 3)
    assert SECRET not in text + json.dumps(fields)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (step(error="out of blocks"), ("ABORTED", 2, "generation")),
        (ServiceError(ErrorKind.GENERATION, "the engine is gone"), ("ABORTED", 2, "generation")),
        (asyncio.Event(), ("CANCELLED", 2, "cancelled")),  # the caller leaves
    ],
    ids=["failed", "lost", "left"],
)
async def test_tokens_of_a_stream_that_does_not_end_well_are_logged(
    service: Service, lines: Callable[[], list[logging.LogRecord]], end: Any, expected: Any
) -> None:
    token, *_ = demo_ids("x")
    service.use_script(script(step(token), step(token), end))
    stream = service.call("GenerateStream", generate_request(), rest=False)
    with suppress(aio.AioRpcError, asyncio.CancelledError):
        for _ in range(2):
            await stream.read()
        if isinstance(end, asyncio.Event):
            stream.cancel()
        await stream.read()
    await eventually(lambda: bool(lines()))
    (fields,) = (line.fields for line in lines())  # type: ignore[attr-defined]
    assert (fields["status"], fields["generated_tokens"], fields["error"]) == expected
    assert fields["prompt_tokens"] > 0


async def test_texts_of_one_prompt_count_it_once(
    service: Service, lines: Callable[[], list[logging.LogRecord]]
) -> None:
    token, *_ = demo_ids("x")
    await service.ask("Generate", generate_request(), rest=False)
    service.use_script(script(step(token), step(error="out of blocks")))
    for parameters in ({}, {"best_of": 2, "do_sample": True}):
        await service.ask("Generate", generate_request(parameters), rest=False)
    await eventually(lambda: len(lines()) == 3)
    noted = [line.fields for line in lines()]  # type: ignore[attr-defined]
    assert len({fields["prompt_tokens"] for fields in noted}) == 1
    assert [fields["generated_tokens"] for fields in noted[1:]] == [1, 2]


async def test_a_line_of_one_of_several_service_processes_says_which(
    service: Service, lines: Callable[[], list[logging.LogRecord]]
) -> None:
    await generate(service, "id")
    await eventually(lambda: bool(lines()))
    (line,) = lines()
    assert " service.access #3: Generate " in text_formatter(3).format(line)
    assert " service.access: Generate " in text_formatter().format(line)
    assert json.loads(JsonFormatter(3).format(line))["worker"] == 3
    assert "worker" not in json.loads(JsonFormatter().format(line))


async def test_health_checks_leave_no_lines(
    service: Service, lines: Callable[[], list[logging.LogRecord]]
) -> None:
    await service.ask("Health", pb.HealthRequest(), rest=False)
    await generate(service, None)
    await eventually(lambda: bool(lines()))
    assert len(lines()) == 1


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", ""])
async def test_a_grpc_caller_cannot_say_what_path_it_asked_for(
    service: Service, lines: Callable[[], list[logging.LogRecord]], path: str
) -> None:
    request = pb.GenerateRequest(inputs=SECRET, parameters=pb.GenerateParameters(max_new_tokens=1))
    call = service.channel.unary_unary(GENERATE, bytes, pb.GenerateResponse.parse)
    await call(request, metadata=[("x-envoy-original-path", path)])
    await eventually(lambda: bool(lines()))
    (line,) = lines()
    assert line.fields["path"] == GENERATE  # type: ignore[attr-defined]


@pytest.mark.parametrize("query", ["", "?key=hidden"])
async def test_the_gateway_says_what_path_a_rest_caller_asked_for(
    service: Service, lines: Callable[[], list[logging.LogRecord]], query: str
) -> None:
    body = b'{"inputs": "a secret prompt", "parameters": {"max_new_tokens": 1}}'
    call = service.gateway.unary_unary(GENERATE, bytes, pb.GenerateResponse.parse)
    request = pb.GenerateRequest(http=HttpBody(content_type="application/json", data=body))
    await call(request, metadata=[("x-envoy-original-path", f"/generate{query}")])
    await eventually(lambda: bool(lines()))
    (line,) = lines()
    assert line.fields["path"] == "/generate"  # type: ignore[attr-defined]
