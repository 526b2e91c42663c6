"""The plan of a server: its ports, its commands, when each is ready, and the banner."""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from service.access.keys import key_line, make_key
from service.launch import envoy_admin
from service.launch import plan as plan_module
from service.launch.place import Place, own_place
from service.launch.plan import held_ports, make_plan
from service.launch.settings import Settings
from service.routes import SERVICE
from tests.certificates import Authority

SETTINGS = Settings(port=0, grpc_port=0)


def test_port_asked_for_twice_is_refused() -> None:
    with held_ports(SETTINGS) as settings:
        port = settings.port  # one that is free
    twice = Settings(port=port, grpc_port=port)
    with pytest.raises(OSError, match="asked for twice"), held_ports(twice):
        pass


def test_port_zero_becomes_two_free_ports() -> None:
    with held_ports(SETTINGS) as settings:
        assert 0 not in (settings.port, settings.grpc_port)
        assert settings.port != settings.grpc_port


def test_ports_are_held_for_those_who_listen_there() -> None:
    """As Envoy and gRPC do; a program that is given any port has another one."""
    with held_ports(SETTINGS) as settings, socket.socket() as child, socket.socket() as stranger:
        address = (settings.grpc_host, settings.grpc_port)
        with pytest.raises(OSError):
            stranger.bind(address)
        child.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        child.bind(address)
        child.listen()
        with socket.create_connection(address):
            child.accept()[0].close()


def test_real_plan_hands_every_child_the_same_settings(tmp_path: Path) -> None:
    settings = Settings(port=1, grpc_port=2, model_id=str(tmp_path), service_workers=1)
    plan = make_plan(settings, tmp_path)
    assert list(plan.commands) == ["engine", "service", "envoy"]
    of_service = {"TOKENWIRE_KEPT": str(tmp_path)}
    of_service |= envoy_admin.environment(tmp_path / "admin.sock")
    assert plan.environments == {"service": of_service}
    for name in ("engine", "service"):
        command = plan.commands[name]
        assert name in command
        assert f"--engine-socket={tmp_path / 'engine.sock'}" in command
        assert f"--model-id={tmp_path}" in command
    assert str(tmp_path / "envoy.yaml") in plan.commands["envoy"]


def test_several_service_processes_have_an_address_each(tmp_path: Path) -> None:
    plan = make_plan(Settings(port=1, grpc_port=2, service_workers=3), tmp_path)
    names = ["service-1", "service-2", "service-3"]
    assert list(plan.commands) == ["engine", *names, "envoy"]
    sockets = [tmp_path / f"gateway-{number}.sock" for number in (1, 2, 3)]
    for name, path in zip(names, sockets, strict=True):
        assert f"--gateway-socket={path}" in plan.commands[name]
        assert f"--engine-socket={tmp_path / 'engine.sock'}" in plan.commands[name]
    places = [own_place(plan.environments[name]) for name in names]
    assert places == [Place(number, 3, tmp_path) for number in (1, 2, 3)]
    assert set(plan.signs_of_life) == set(plan.commands)
    envoy = yaml.safe_load((tmp_path / "envoy.yaml").read_text())
    for cluster in envoy["static_resources"]["clusters"]:
        (endpoints,) = cluster["load_assignment"]["endpoints"]
        found = [item["endpoint"]["address"]["pipe"]["path"] for item in endpoints["lb_endpoints"]]
        assert found == [*map(str, sockets)]
        assert cluster["lb_policy"] == "LEAST_REQUEST"


@pytest.mark.parametrize("name", ["own.sock", "own"])
def test_a_socket_of_ones_own_gets_numbers(tmp_path: Path, name: str) -> None:
    settings = Settings(gateway_socket=tmp_path / name, service_workers=2, port=1, grpc_port=2)
    commands = make_plan(settings, tmp_path).commands
    path = tmp_path / name.replace("own", "own-2")
    assert f"--gateway-socket={path}" in commands["service-2"]


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 1), (8, 1), (16, 2), (20, 2), (256, 4)])
def test_cores_decide_on_service_processes(
    monkeypatch: pytest.MonkeyPatch, cores: int, count: int
) -> None:
    monkeypatch.setattr("service.launch.settings.num_processors", lambda: cores)
    assert Settings().num_service_workers == count
    assert Settings(service_workers=3).num_service_workers == 3


async def test_service_is_ready_when_its_health_check_says_serving() -> None:
    server = grpc.aio.server()
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        assert not await plan_module.is_serving(f"127.0.0.1:{port}")
        await servicer.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert not await plan_module.is_serving(f"127.0.0.1:{port}")
        await servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        assert await plan_module.is_serving(f"127.0.0.1:{port}")
    finally:
        await server.stop(None)
    assert not await plan_module.is_serving(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("reply", "ready"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        (b"", False),
    ],
)
async def test_gateway_is_ready_when_health_is_answered_with_200(reply: bytes, ready: bool) -> None:
    requests: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readline())
        writer.write(reply)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await plan_module._answers_health(Settings(port=port), 1) is ready
    assert requests == [b"GET /health HTTP/1.1\r\n"]
    assert not await plan_module._answers_health(Settings(port=port), 1)


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({"gateway_socket": Path("/s"), "gateway_port": 3}, "unix:/s"),
        ({"gateway_port": 3}, "127.0.0.1:3"),
        ({}, "127.0.0.1:2"),
        ({"grpc_host": "::"}, "[::1]:2"),
    ],
)
def test_service_is_asked_where_no_key_is_needed(changes: dict[str, Any], target: str) -> None:
    assert Settings(grpc_port=2, **changes).probe_target == target


async def test_gateway_that_wants_a_key_for_health_is_ready(tmp_path: Path) -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 401 Unauthorized\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with_keys = Settings(port=port, api_key_file=tmp_path / "keys")
        assert await plan_module._answers_health(with_keys, 1)
        assert not await plan_module._answers_health(Settings(port=port), 1)


@pytest.mark.parametrize(
    ("answer", "ready"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\ncluster.service.membership_healthy: 1\n", True),
        (b"HTTP/1.1 200 OK\r\n\r\ncluster.service.membership_healthy: 0\n", False),
        (b"HTTP/1.1 200 OK\r\n\r\n", False),
        (b"", False),
    ],
)
async def test_gateway_that_wants_a_certificate_is_asked_how_it_finds_the_service(
    tmp_path: Path, answer: bytes, ready: bool
) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.certificate)
    context.load_cert_chain(pair.certificate, pair.key)
    context.verify_mode = ssl.CERT_REQUIRED
    files = {"tls_certificate": pair.certificate, "tls_key": pair.key}
    admin = tmp_path / "admin.sock"

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with (
        await asyncio.start_unix_server(reply, admin),
        await asyncio.start_server(
            lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context
        ) as server,
    ):
        port = server.sockets[0].getsockname()[1]
        mutual = Settings(port=port, **files, tls_client_ca=authority.certificate)
        assert await plan_module._answers_health(mutual, admin) is ready
        assert not await plan_module._answers_health(Settings(port=port, **files), admin)
    assert not await plan_module._answers_health(mutual, admin)


def test_banner_has_calls_that_can_be_pasted(tmp_path: Path) -> None:
    banner = make_plan(Settings(hostname="0.0.0.0", port=1, grpc_port=2), tmp_path).banner
    for address in ("http://127.0.0.1:1", "127.0.0.1:2", "http://127.0.0.1:1/metrics"):
        assert address in banner
    words = shlex.split(banner[banner.index("curl -N") : banner.index("or type")])
    bodies = [json.loads(words[index + 1]) for index, word in enumerate(words) if word == "-d"]
    assert bodies[0]["stream"] is True
    assert bodies[1]["inputs"]
    assert "tokenwire.v1.TextGenerationService/Generate" in words
    assert banner.rstrip().endswith("tokenwire chat --target http://127.0.0.1:1")


def test_banner_says_where_keys_and_certificates_go(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    keys = tmp_path / "keys"
    keys.write_text(key_line("alice", make_key()))
    settings = Settings(
        port=1,
        grpc_port=2,
        api_key_file=keys,
        tls_certificate=pair.certificate,
        tls_key=pair.key,
        grpc_tls_certificate=pair.certificate,
        grpc_tls_key=pair.key,
        grpc_tls_client_ca=authority.certificate,
    )
    banner = make_plan(settings, tmp_path).banner
    assert "curl -N --cacert CA.pem https://127.0.0.1:1/v1/chat/completions" in banner
    assert "grpcurl -cacert CA.pem -cert CLIENT.pem -key CLIENT.key -H" in banner
    assert banner.count('-H "Authorization: Bearer $API_KEY"') == 2
