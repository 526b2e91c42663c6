"""A collector that is gone, or does not answer, holds up nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest

from service.call_record import begin_record
from service.launch.otlp import TraceExport
from service.tracing.export import TraceSender
from tests.certificates import Authority
from tests.otlp import Tls, grpc_collector, http_collector

METHOD = "/tokenwire.v1.TextGenerationService/Info"


def make_spans(sender: TraceSender, count: int = 1) -> str:
    """Makes the spans of so many calls; returns the id of the last one's trace."""
    tracer = sender.tracer("model", captures_content=False)
    for _ in range(count):
        record = begin_record("id")
        tracer.begin(METHOD, (), record, from_gateway=False, path=None).end("OK", 0)
    return record.trace_id


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_the_last_spans_are_sent_at_the_end(protocol: str) -> None:
    with grpc_collector() if protocol == "grpc" else http_collector() as collector:
        url = collector.url if protocol == "grpc" else f"{collector.url}/v1/traces"
        sender = TraceSender(TraceExport(url=url, protocol=protocol))  # type: ignore[arg-type]
        trace_id = make_spans(sender)
        await sender.close()
        (span,) = collector.trace(trace_id, METHOD[1:])
        assert span.attributes["rpc.response.status_code"] == "OK"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_nobody_waits_for_a_collector_that_is_gone(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.tracing.export._FLUSH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # nobody accepts
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        sender = TraceSender(TraceExport(url=url, protocol=protocol))  # type: ignore[arg-type]
        make_spans(sender, 3000)  # more than the queue takes
        async with asyncio.timeout(20):
            await sender.close()


async def test_nobody_waits_for_a_collector_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.tracing.export._FLUSH_S", 0.2)
    may_answer = threading.Event()
    with grpc_collector(serves=may_answer.wait) as collector:
        sender = TraceSender(TraceExport(url=collector.url))
        make_spans(sender)
        async with asyncio.timeout(20):
            await sender.close()
        assert not collector.spans
        may_answer.set()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_collector_that_shows_somebody_elses_certificate_gets_nothing(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificate is right, but for another name, or of an authority that is not believed."""
    monkeypatch.setattr("service.tracing.export._FLUSH_S", 0.2)
    authority = Authority(tmp_path)
    wrong = authority.issue("wrong", "DNS:elsewhere.example")
    tls = Tls(wrong, authority.certificate)
    with grpc_collector(tls=tls) if protocol == "grpc" else http_collector(tls=tls) as collector:
        url = collector.url if protocol == "grpc" else f"{collector.url}/v1/traces"
        for believed in (authority.certificate, None):
            export = TraceExport(
                url=url,
                protocol=protocol,  # type: ignore[arg-type]
                is_encrypted=True,
                ca=believed,
                certificate=wrong.certificate,
                key=wrong.key,
            )
            sender = TraceSender(export)
            make_spans(sender)
            await sender.close()
        assert not collector.spans


def test_a_certificate_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for protocol in ("grpc", "http/protobuf"):
        export = TraceExport(
            url="https://localhost:1", protocol=protocol, is_encrypted=True, ca=tmp_path / "missing"
        )  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="missing"):
            export.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"), ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")],
)
def test_variables_that_cannot_be_used_are_errors(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="traces cannot be sent: "):
        TraceSender(TraceExport(url="http://127.0.0.1:1"))
