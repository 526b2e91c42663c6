"""A replica that cannot be reached gets nothing for a while, unless it is the last one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import h2.config
import h2.connection
import h2.events
import pytest
import yaml

from service.launch import gateway as gateway_module
from service.launch.gateway import GatewayConfig
from tests.envoy.gateway import Gateway, StartGateway, poll

SERVING = b"\0\0\0\0\2\x08\1"  # a framed HealthCheckResponse


async def say_serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers every call on a connection as if it was a health check."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    connection.initiate_connection()
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.StreamEnded):
                    head = [(":status", "200"), ("content-type", "application/grpc")]
                    connection.send_headers(event.stream_id, head)
                    connection.send_data(event.stream_id, SERVING)
                    connection.send_headers(
                        event.stream_id, [("grpc-status", "0")], end_stream=True
                    )
            writer.write(connection.data_to_send())
    writer.close()


@contextlib.asynccontextmanager
async def replica() -> AsyncIterator[tuple[asyncio.Server, int]]:
    """A replica and its port. Once it is closed it refuses connections, but seems healthy."""
    server = await asyncio.start_server(say_serving, "127.0.0.1", 0)
    try:
        yield server, server.sockets[0].getsockname()[1]
    finally:
        server.close()


def wait_for_healthy(gateway: Gateway, number: int) -> None:
    """Returns once Envoy takes so many replicas for healthy."""
    poll(lambda: gateway.stat("membership_healthy") == number, f"{number} replicas are healthy")


def call_until_left_out(gateway: Gateway) -> None:
    """Calls until one replica is left out; no call fails, since the other one takes them all."""

    def is_left_out() -> bool:
        assert gateway.client.post("/generate", json={}).status_code == 200
        return gateway.stat("outlier_detection.ejections_active") == 1

    poll(is_left_out, "a replica is left out")


async def test_replica_that_refuses_connections_is_left_out(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = gateway_module.render
    async with replica() as (server, port):

        def with_both(config: GatewayConfig) -> str:
            rendered = yaml.safe_load(render(config))
            cluster = rendered["static_resources"]["clusters"][0]
            other = {"address": "127.0.0.1", "port_value": port}
            endpoint = {"endpoint": {"address": {"socket_address": other}}}
            cluster["load_assignment"]["endpoints"][0]["lb_endpoints"].append(endpoint)
            return str(yaml.safe_dump(rendered))

        monkeypatch.setattr(gateway_module, "render", with_both)
        with contextlib.ExitStack() as stack:
            running = await asyncio.to_thread(stack.enter_context, start_gateway())
            await asyncio.to_thread(wait_for_healthy, running, 2)
            server.close()
            await asyncio.to_thread(call_until_left_out, running)


async def test_last_replica_is_never_left_out(start_gateway: StartGateway) -> None:
    async with replica() as (server, port):
        with contextlib.ExitStack() as stack:
            starting = start_gateway(upstream_port=port)
            running = await asyncio.to_thread(stack.enter_context, starting)
            await asyncio.to_thread(wait_for_healthy, running, 1)
            server.close()
            for _ in range(10):
                reply = await asyncio.to_thread(running.client.get, "/health")
                assert reply.status_code == 503
            assert running.stat("upstream_cx_connect_fail") >= 10
            assert running.stat("outlier_detection.ejections_active") == 0
