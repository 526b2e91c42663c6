"""Metrics that are pushed by OTLP, to a real receiver, as OpenTelemetry's variables say."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from engine.protocol.request import SequenceOutput, Token
from service.call_record import begin_record, note_operation
from service.generation.generation import Timings
from service.generation.metrics import Metrics
from service.generation.pushed_metrics import pushed_metrics
from service.generation.tally import Pace, Tally
from service.launch.otlp import DEFAULT_SERVICE_NAME, Export, metric_export
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
    for name in (name for name in os.environ if name.startswith("OTEL_")):
        monkeypatch.delenv(name)


async def pushed(
    variables: dict[str, str],
    received: Received,
    patch: pytest.MonkeyPatch,
    service_name: str | None = None,
) -> Any:
    """What a receiver gets of a chat of two tokens, a refusal and a first token."""
    for name, value in variables.items():
        patch.setenv(name, value)
    listener = pushed_metrics("some/model", metric_export(None, service_name, variables))
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
    assert attributes(request.resource_metrics[0].resource)["service.name"] == DEFAULT_SERVICE_NAME
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
    ("flag", "variables"),
    [
        (None, {"OTEL_SERVICE_NAME": "mine", "OTEL_RESOURCE_ATTRIBUTES": "team=a"}),
        (None, {"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine,team=a"}),
        ("mine", {"OTEL_SERVICE_NAME": "x", "OTEL_RESOURCE_ATTRIBUTES": "service.name=y,team=a"}),
    ],
)
async def test_the_service_has_the_name_that_flag_and_variables_give_it(
    flag: str | None, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with grpc_receiver() as (url, received):
        given = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **variables}
        request = await pushed(given, received, monkeypatch, flag)
    found = attributes(request.resource_metrics[0].resource)
    assert (found["service.name"], found["team"]) == ("mine", "a")


def test_nothing_is_pushed_without_a_collector() -> None:
    assert pushed_metrics("some/model", None) is None


def test_a_variable_that_cannot_be_used_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="metrics cannot be pushed: "):
        pushed_metrics("some/model", Export(url="http://127.0.0.1:1"))
