"""A real Envoy in front of a fake service, one pair per module."""

from __future__ import annotations

import contextlib
import dataclasses
import ssl
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.bundled import DESCRIPTORS
from service.launch.gateway import GatewayConfig
from tests.envoy.fake_service import DEADLINE, FakeService, Messages
from tests.envoy.gateway import Gateway, StartGateway, run_envoy


@pytest.fixture(scope="session")
def gateway_messages() -> Messages:
    """The message classes."""
    return Messages()


@pytest.fixture(scope="module")
def start_gateway(
    gateway_messages: Messages, tmp_path_factory: pytest.TempPathFactory
) -> StartGateway:
    """Starts a fake service and an Envoy with some fields of GatewayConfig changed.

    `verify` says whose certificates the client believes, and which one it has itself.
    """

    @contextlib.contextmanager
    def start(verify: ssl.SSLContext | None = None, **changes: Any) -> Iterator[Gateway]:
        service = FakeService(gateway_messages)
        service.reset()
        config = GatewayConfig(
            listen_host="127.0.0.1",
            listen_port=0,
            upstream_host="127.0.0.1",
            upstream_port=service.port,
            descriptors=DESCRIPTORS,
        )
        config = dataclasses.replace(config, **changes)
        scheme = "http" if config.tls is None else "https"
        directory = tmp_path_factory.mktemp("envoy")
        with contextlib.ExitStack() as stack:
            stack.callback(service.stop)
            port, admin = stack.enter_context(run_envoy(config, directory))
            host = "localhost" if scheme == "https" else "127.0.0.1"  # the certificate's name
            url = f"{scheme}://{host}:{port}"
            client = stack.enter_context(
                httpx.Client(
                    base_url=url,
                    timeout=DEADLINE,
                    verify=verify or ssl.create_default_context(),
                    trust_env=False,
                )
            )
            yield Gateway(
                url.partition("//")[2], service, gateway_messages, client, admin, directory
            )

    return start


@pytest.fixture(scope="module")
def running_gateway(start_gateway: StartGateway) -> Iterator[Gateway]:
    """A gateway whose service is healthy."""
    with start_gateway() as gateway:
        gateway.wait_until_healthy()
        yield gateway


@pytest.fixture
def gateway(running_gateway: Gateway) -> Gateway:
    """The gateway of the module; its service has the default behaviour again."""
    running_gateway.service.reset()
    return running_gateway
