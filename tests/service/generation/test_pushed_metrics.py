"""Metrics that are pushed by OTLP, to a real receiver, as OpenTelemetry's variables say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from engine.protocol.request import SequenceOutput, Token
from service.call_record import begin_record, note_operation
from service.generation.generator import Timings
from service.generation.metrics import Metrics
from service.generation.pushed_metrics import pushed_metrics
from service.generation.tally import Pace, Tally
from tests.service.fakes import LIMITS, TIMEOUT_S, generation
from tests.service.metrics.otlp_receiver import (
    Received,
    attributes,
    grpc_receiver,
    histograms,
    http_receiver,
)

Receiver = Callable[[], AbstractContextManager[tuple[str, Received]]]
ENDPOINT = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("METRICS_EXPORTER", "SDK_DISABLED", "SERVICE_NAME", "RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)


async def pushed(variables: dict[str, str], received: Received, patch: pytest.MonkeyPatch) -> Any:
    """What a receiver gets of a chat of two tokens, a refusal and a first token."""
    for name, value in variables.items():
        patch.setenv(name, value)
    listener = pushed_metrics("some/model")
    assert listener is not None
    metrics = Metrics(LIMITS, listener)
    call = begin_record(None)
    note_operation("chat")
    metrics.requests.finished(generation(timings=Timings(10.0, 10.25, 10.5, 11.5, 11.25)))
    metrics.requests.failed("overloaded", 0.03)
    tally = Tally(now=2.0)
    tally.add(Pace(1.5, 3, call=call), SequenceOutput("a", Token(5, -0.5)))
    metrics.requests.step(tally)
    await listener.close()
    return received.get(timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    ("receiver", "protocol", "path"),
    [
        (grpc_receiver, "grpc", ""),
        (grpc_receiver, "", ""),
        (http_receiver, "http/protobuf", "/v1/metrics"),
    ],
)
async def test_requests_are_pushed_as_the_conventions_say(
    receiver: Receiver, protocol: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as (url, received):
        variables = {ENDPOINT: url + path, PROTOCOL: protocol}
        request = await pushed(variables, received, monkeypatch)
    assert attributes(request.resource_metrics[0].resource)["service.name"] == "tokenwire"
    found = histograms(request)
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenwire",
        "gen_ai.request.model": "some/model",
        "gen_ai.response.model": "some/model",
    }
    succeeded, failed = found["gen_ai.server.request.duration"]
    assert attributes(succeeded) == common
    assert (succeeded.count, succeeded.sum) == (1, 1.5)
    assert attributes(failed) == {**common, "error.type": "overloaded"}
    assert (failed.count, failed.sum) == (1, 0.03)
    assert list(failed.explicit_bounds[:3]) == [0.01, 0.02, 0.04]
    (first,) = found["gen_ai.server.time_to_first_token"]
    assert (attributes(first), first.sum) == (common, 0.5)
    (per_token,) = found["gen_ai.server.time_per_output_token"]
    assert (attributes(per_token), per_token.sum) == (common, 0.25)
    usage = {attributes(p)["gen_ai.token.type"]: p.sum for p in found["gen_ai.client.token.usage"]}
    assert usage == {"input": 3, "output": 2}


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_SERVICE_NAME": "mine"},
        {"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine,team=a"},
    ],
)
async def test_the_service_has_the_name_that_the_variables_give_it(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with grpc_receiver() as (url, received):
        given = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **variables}
        request = await pushed(given, received, monkeypatch)
    assert attributes(request.resource_metrics[0].resource)["service.name"] == "mine"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_METRICS_EXPORTER": "none", ENDPOINT: "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "true", ENDPOINT: "http://127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"},
        {ENDPOINT: " "},
    ],
)
def test_nothing_is_pushed_unless_a_variable_says_where_to(environment: dict[str, str]) -> None:
    assert pushed_metrics("some/model", environment) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"OTEL_METRICS_EXPORTER": "console"},
            "OTEL_METRICS_EXPORTER must be otlp or none. Given: console",
        ),
        (
            {ENDPOINT: "http://127.0.0.1:1", PROTOCOL: "http/json"},
            f"{PROTOCOL} must be grpc or http/protobuf. Given: http/json",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "udp"},
            "OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf. Given: udp",
        ),
    ],
)
def test_what_cannot_be_done_is_an_error(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        pushed_metrics("some/model", environment)
    assert str(caught.value) == message
