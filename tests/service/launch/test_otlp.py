"""Where traces and metrics go, by flags and by OpenTelemetry's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.launch.options import SettingsError
from service.launch.otlp import (
    DEFAULT_SERVICE_NAME,
    Sampling,
    TraceExport,
    metric_export,
    trace_export,
)

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
URL = "http://collector:4317"


def export(endpoint: str | None = None, name: str | None = None, **variables: str) -> TraceExport:
    """The export that must come out."""
    found = trace_export(endpoint, name, variables)
    assert found is not None
    return found


def test_nobody_asks_for_traces() -> None:
    assert trace_export(None, "a name alone", {"OTEL_SERVICE_NAME": "x"}) is None


@pytest.mark.parametrize(
    "variables",
    [
        {ENDPOINT: URL},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": URL},
        {"OTEL_TRACES_EXPORTER": "otlp"},
    ],
)
def test_any_of_these_variables_asks_for_them(variables: dict[str, str]) -> None:
    assert trace_export(None, None, variables) is not None
    for name, value in (("OTEL_SDK_DISABLED", "TRUE"), ("OTEL_TRACES_SAMPLER", "always_off")):
        assert trace_export(None, None, variables | {name: value}) is None
    assert trace_export(URL, None, variables | {"OTEL_TRACES_EXPORTER": "none"}) is None


@pytest.mark.parametrize(
    ("endpoint", "variables", "url", "host", "port", "encrypted"),
    [
        (URL, {ENDPOINT: "http://other:1"}, URL, "collector", 4317, False),
        ("http://collector", {}, "http://collector", "collector", 4317, False),
        ("https://[::1]:9", {}, "https://[::1]:9", "::1", 9, True),
        ("collector:5", {}, "https://collector:5", "collector", 5, True),
        (
            "collector:5",
            {"OTEL_EXPORTER_OTLP_INSECURE": "true"},
            "http://collector:5",
            "collector",
            5,
            False,
        ),
        (None, {"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4317", "localhost", 4317, False),
    ],
)
def test_a_collector_over_grpc(
    endpoint: str | None,
    variables: dict[str, str],
    url: str,
    host: str,
    port: int,
    encrypted: bool,
) -> None:
    found = export(endpoint, **variables)
    assert (found.url, found.host, found.port) == (url, host, port)
    assert (found.protocol, found.is_encrypted) == ("grpc", encrypted)
    assert found.is_address is (host == "::1")


@pytest.mark.parametrize(
    ("endpoint", "variables", "url"),
    [
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("http://c:4318/v1/traces", {}, "http://c:4318/v1/traces"),
        (None, {ENDPOINT: "https://c/otlp/"}, "https://c/otlp/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/own"}, "http://c/own"),
        (None, {"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces"),
    ],
)
def test_a_collector_over_http(endpoint: str | None, variables: dict[str, str], url: str) -> None:
    found = export(endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf", **variables)
    assert (found.url, found.protocol) == (url, "http/protobuf")


@pytest.mark.parametrize(
    ("endpoint", "variables", "text"),
    [
        ("nonsense://x", {}, "`otlp_endpoint` must be a URL such as http://collector:4317"),
        ("http://", {}, "`otlp_endpoint` must be a URL"),
        ("http://c:99999", {}, "`otlp_endpoint` must be a URL"),
        (None, {ENDPOINT: "http://a b"}, "OTEL_EXPORTER_OTLP_ENDPOINT must be a URL"),
        (
            "c:1",
            {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            "`otlp_endpoint` must be a URL",
        ),
        (URL, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "must be grpc or http/protobuf"),
        (None, {"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER must be otlp or none"),
        (URL, {"OTEL_EXPORTER_OTLP_CLIENT_KEY": "/k"}, "must be given together"),
        (URL, {"OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE": "/c"}, "must be given together"),
    ],
)
def test_what_cannot_be_done_is_an_error(
    endpoint: str | None, variables: dict[str, str], text: str
) -> None:
    with pytest.raises(SettingsError, match=text):
        trace_export(endpoint, None, variables)


def test_the_servers_name_and_attributes() -> None:
    attributes = "service.name=third,team=a%2Cb,rubbish,deployment.environment=x"
    variables = {"OTEL_SERVICE_NAME": "second", "OTEL_RESOURCE_ATTRIBUTES": attributes}
    assert export(URL).service_name == DEFAULT_SERVICE_NAME
    assert export(URL, OTEL_RESOURCE_ATTRIBUTES=attributes).service_name == "third"
    assert export(URL, **variables).service_name == "second"
    assert export(URL, "first", **variables).service_name == "first"
    pairs = (("team", "a,b"), ("deployment.environment", "x"))
    assert export(URL, **variables).resource == pairs


@pytest.mark.parametrize(
    ("sampler", "argument", "sampling"),
    [
        ("", "", Sampling()),
        ("always_on", "", Sampling(1.0, follows_parent=False)),
        ("parentbased_always_off", "", Sampling(0.0)),
        ("traceidratio", "0.25", Sampling(0.25, follows_parent=False)),
        ("parentbased_traceidratio", "0.25", Sampling(0.25)),
        ("parentbased_traceidratio", "much", Sampling(1.0)),
        ("jaeger_remote", "", Sampling()),
    ],
)
def test_which_traces_are_kept(sampler: str, argument: str, sampling: Sampling) -> None:
    variables = {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}
    assert export(URL, **variables).sampling == sampling


def test_headers_and_files_of_traces_come_before_those_of_all_signals() -> None:
    found = export(
        URL,
        OTEL_EXPORTER_OTLP_HEADERS="x=1",
        OTEL_EXPORTER_OTLP_TRACES_HEADERS="Authorization=Bearer%20key,y=2",
        OTEL_EXPORTER_OTLP_CERTIFICATE="/ca.pem",
        OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE="/own.pem",
        OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE="/client.pem",
        OTEL_EXPORTER_OTLP_CLIENT_KEY="/key.pem",
    )
    assert found.headers == (("authorization", "Bearer key"), ("y", "2"))
    assert (found.ca, found.key) == (Path("/own.pem"), Path("/key.pem"))
    assert "key" not in repr(found).replace("key=PosixPath('/key.pem')", "")


METRICS = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
OVER_HTTP = {"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_METRICS_EXPORTER": "none", METRICS: URL},
        {"OTEL_SDK_DISABLED": "true", METRICS: URL},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": URL},
        {METRICS: " "},
    ],
)
def test_no_metrics_are_pushed_unless_a_variable_says_so(variables: dict[str, str]) -> None:
    assert metric_export(URL, "name", variables) is None


@pytest.mark.parametrize(
    ("endpoint", "variables", "url"),
    [
        (None, {ENDPOINT: URL}, URL),
        (None, {METRICS: "http://own:1", ENDPOINT: URL}, "http://own:1"),
        (URL, {ENDPOINT: "http://other:1"}, "http://other:1"),
        (URL, {"OTEL_METRICS_EXPORTER": "otlp"}, URL),
        (None, {"OTEL_METRICS_EXPORTER": "otlp"}, "http://localhost:4317"),
        (None, {ENDPOINT: URL} | OVER_HTTP, f"{URL}/v1/metrics"),
        (None, {METRICS: "http://c/own"} | OVER_HTTP, "http://c/own"),
        (
            "http://c/v1/traces",
            {"OTEL_METRICS_EXPORTER": "otlp"} | OVER_HTTP,
            "http://c/v1/metrics",
        ),
    ],
)
def test_where_metrics_are_pushed_to(
    endpoint: str | None, variables: dict[str, str], url: str
) -> None:
    found = metric_export(endpoint, None, variables)
    assert found is not None
    assert found.url == url
    assert found.protocol == ("http/protobuf" if OVER_HTTP.items() <= variables.items() else "grpc")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"OTEL_METRICS_EXPORTER": "console"},
            "OTEL_METRICS_EXPORTER must be otlp or none. Given: console",
        ),
        (
            {METRICS: URL, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL must be grpc or http/protobuf. Given: http/json",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "udp"},
            "OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf. Given: udp",
        ),
        (
            {METRICS: "ftp://x"},
            f"{METRICS} must be a URL such as http://collector:4317. Given: ftp://x",
        ),
    ],
)
def test_metrics_that_cannot_be_pushed_are_an_error(
    variables: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        metric_export(None, None, variables)
    assert str(caught.value) == message


def test_both_signals_have_one_name_and_headers_of_their_own() -> None:
    variables = {
        ENDPOINT: URL,
        "OTEL_SERVICE_NAME": "name",
        "OTEL_EXPORTER_OTLP_HEADERS": "x=1",
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "y=2",
    }
    metrics, traces = metric_export(None, None, variables), export(**variables)
    assert metrics is not None
    assert metrics.service_name == traces.service_name == "name"
    assert (metrics.headers, traces.headers) == ((("y", "2"),), (("x", "1"),))
