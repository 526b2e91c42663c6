"""A running Envoy on free ports.

No port is fixed: Envoy listens on port 0 and reports its port through the admin interface.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx

from service.launch import gateway as gateway_module
from service.launch.gateway import GatewayConfig
from service.routes import SERVICE
from tests.envoy.fake_service import DEADLINE, FakeService, Messages, serialize

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Gateway:
    """A running Envoy: its addresses, its files, and the service that it forwards to."""

    target: str
    service: FakeService
    messages: Messages
    client: httpx.Client
    admin: str
    directory: Path

    def stat(self, name: str) -> int:
        """Returns a number that Envoy counts about the cluster of the service."""
        name = f"cluster.service.{name}"
        url = f"http://{self.admin}/stats?format=json&filter=^{name}$"
        return int(httpx.get(url, trust_env=False).json()["stats"][0]["value"])

    def memory(self) -> int:
        """Returns the bytes that Envoy has allocated: now, unlike its statistics."""
        reply = httpx.get(f"http://{self.admin}/memory", trust_env=False)
        return int(reply.json()["allocated"])

    def wait_until_healthy(self, status: int = 200) -> None:
        """Returns once /health answers with `status`."""
        poll(lambda: self.client.get("/health").status_code == status, f"/health answers {status}")

    def channel(self) -> grpc.Channel:
        """Returns a channel for native gRPC."""
        return grpc.insecure_channel(self.target)

    def stub(self, channel: grpc.Channel, method: str) -> Any:
        """Returns the callable for `method` on `channel`."""
        descriptor = self.messages.service.methods_by_name[method]
        connect = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
        return connect(
            f"/{SERVICE}/{method}",
            request_serializer=serialize,
            response_deserializer=self.messages.parser(descriptor.output_type),
        )


def poll(condition: Callable[[], T | None], what: str) -> T:
    """Returns the first true value of `condition`; after the deadline, fails and names `what`."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {DEADLINE} s: {what}")


@contextlib.contextmanager
def run_envoy(config: GatewayConfig, directory: Path) -> Iterator[tuple[int, str]]:
    """Runs Envoy with `config` on free ports; yields the port it listens on, and its admin's."""
    config = dataclasses.replace(config, listen_port=0, admin_port=0)
    path = gateway_module.write(config, directory)
    admin = directory / "admin-address"
    log = directory / "envoy.log"
    arguments = gateway_module.command(gateway_module.find_envoy(), path, concurrency=1)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*arguments, "--admin-address-path", str(admin)], stdout=output, stderr=output
        )
    try:
        yield poll(lambda: _listening_port(process, admin, log), "Envoy listens"), admin.read_text()
    finally:
        process.terminate()
        process.wait(DEADLINE)


def _listening_port(process: subprocess.Popen[bytes], admin: Path, log: Path) -> int | None:
    """The port that Envoy reports; None as long as it reports none."""
    assert process.poll() is None, log.read_text()
    try:
        listeners = httpx.get(
            f"http://{admin.read_text()}/listeners?format=json", trust_env=False
        ).json()
        address = listeners["listener_statuses"][0]["local_address"]["socket_address"]
        port = int(address["port_value"])
        # It is reported before the first health check ends, and accepts connections after that.
        socket.create_connection(("127.0.0.1", port)).close()
    except (OSError, httpx.HTTPError, httpx.InvalidURL, KeyError, IndexError):
        return None
    return port


StartGateway = Callable[..., contextlib.AbstractContextManager[Gateway]]
