"""What a server consists of: the commands, how each is known to be ready, and the banner."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import ssl
import sys
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..access.certificates import TlsFiles
from ..bundled import DESCRIPTORS, NAME, PACKAGE
from ..routes import SERVICE
from . import envoy_admin, gateway
from .certificates import follow_certificates
from .endpoints import follow_endpoints
from .files import check_public_certificates
from .kept import VARIABLE as KEPT_VARIABLE
from .place import Place
from .replicas import Replica, make_replicas
from .settings import Settings, address, reachable
from .watch import Notifications, Probe, Probing, Watch

_ADMIN_SOCKET = "admin.sock"  # in the private directory
_PROBE_S = 5.0  # a probe that takes longer has failed


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the start: the progress to log, and a probe that tells when it is reached."""

    progress: str
    reached: Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a supervisor runs.

    Attributes:
        commands: by name, in the order of their start.
        stages: of the start.
        banner: is printed once all stages are reached.
        addresses: the same for programs, by name.
        watch: runs as long as the children do, if there is something to watch.
        signs_of_life: by name, how children are known to be alive; others only by their end.
        environments: by name, variables for children beside those that all have.
        processors: by name, those that children may use; all others use any.
        max_connections: of callers, at a time.
        drain: is called before the children are stopped; it may fail with an OSError.
        is_delivered: whether callers have everything that services have answered; fails with an
            OSError where nobody has it any more.
    """

    commands: Mapping[str, list[str]]
    stages: tuple[Stage, ...]
    banner: str
    addresses: Mapping[str, str] = field(default_factory=dict)
    watch: Callable[[], Coroutine[Any, Any, None]] | None = None
    signs_of_life: Mapping[str, Watch] = field(default_factory=dict)
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    processors: Mapping[str, frozenset[int]] = field(default_factory=dict)
    max_connections: int = 0
    drain: Callable[[], Awaitable[None]] | None = None
    is_delivered: Probe | None = None


@dataclass(frozen=True, slots=True)
class _Worker:
    """A service process: its name, where it takes Envoy's calls, and its place among several."""

    name: str
    socket: Path
    place: Place | None = None

    def settings(self, settings: Settings) -> Settings:
        """Its settings, of those of the server."""
        return replace(settings, gateway_socket=self.socket)


def _workers(settings: Settings, runtime: Path) -> list[_Worker]:
    """The service processes; the only one has no number."""
    socket_path, count = settings.gateway_socket, settings.num_service_workers
    assert socket_path is not None
    if count == 1:
        return [_Worker("service", socket_path)]
    return [
        _Worker(
            f"service-{number}",
            socket_path.with_name(f"{socket_path.stem}-{number}{socket_path.suffix}"),
            Place(number, count, runtime),
        )
        for number in range(1, count + 1)
    ]


def make_plan(settings: Settings, runtime: Path) -> Plan:
    """Returns the plan for the real processes, with Envoy's configuration written and checked.

    Raises:
        ValueError: Envoy refuses its configuration, a certificate cannot be used, or there are too
            few GPUs.
        FileNotFoundError: there is no Envoy.
    """
    settings = replace(
        settings,
        engine_socket=settings.engine_socket or runtime / "engine.sock",
        gateway_socket=settings.gateway_socket or runtime / "gateway.sock",
    )
    command, tls, workers = _own_command(), settings.tls, _workers(settings, runtime)
    sockets, replicas = tuple(worker.socket for worker in workers), make_replicas(settings)
    notified = {
        name: Notifications(runtime / f"{name}.notify")
        for name in (*(one.name for one in replicas), *(worker.name for worker in workers))
    }
    return Plan(
        commands={
            **{one.name: [*command, "engine", *one.settings.to_argv()] for one in replicas},
            **{
                worker.name: [*command, "service", *worker.settings(settings).to_argv()]
                for worker in workers
            },
            "envoy": envoy_command(settings, runtime, is_told=True, sockets=sockets),
        },
        stages=_stages(
            settings,
            admin_address(settings, runtime),
            sockets,
            [notified[one.name] for one in replicas],
        ),
        banner=_banner(settings),
        addresses=_addresses(settings),
        watch=None if tls is None else lambda: follow_certificates(tls, runtime),
        signs_of_life={**notified, "envoy": Probing(lambda: _is_alive(settings, runtime))},
        environments=_environments(replicas, workers, _of_services(settings, runtime)),
        processors={one.name: one.processors for one in replicas if one.processors},
        max_connections=settings.gateway_config(DESCRIPTORS, sockets=sockets).max_connections,
        drain=lambda: _drain_gateway(settings, runtime),
        is_delivered=lambda: _is_idle(settings, runtime),
    )


def _environments(
    replicas: list[Replica], workers: list[_Worker], of_services: Mapping[str, str]
) -> dict[str, Mapping[str, str]]:
    """Variables for those children that have any of their own."""
    return {one.name: one.environment for one in replicas if one.environment} | {
        worker.name: {**of_services, **({} if worker.place is None else worker.place.environment)}
        for worker in workers
    }


def _of_services(settings: Settings, runtime: Path) -> dict[str, str]:
    """Variables for all service processes."""
    admin = admin_address(settings, runtime)
    return {**envoy_admin.environment(admin), KEPT_VARIABLE: str(runtime)}


def admin_address(settings: Settings, directory: Path) -> Path | int:
    """Where Envoy is told and asked: the port that it was given, or a socket in our directory."""
    return settings.admin_port or directory / _ADMIN_SOCKET


async def _is_alive(settings: Settings, runtime: Path) -> bool:
    """Whether Envoy answers on its admin address."""
    return await envoy_admin.is_alive(admin_address(settings, runtime))


async def _drain_gateway(settings: Settings, runtime: Path) -> None:
    """Lets Envoy drain first; with an admin port it has no admin socket that could be trusted."""
    if settings.admin_port is None:
        await envoy_admin.drain(runtime / _ADMIN_SOCKET)


async def _is_idle(settings: Settings, runtime: Path) -> bool:
    """Whether Envoy has no call, which it would have while it holds a byte for a caller."""
    return not await envoy_admin.num_calls(admin_address(settings, runtime))


def _own_command() -> list[str]:
    """The command `tokenwire`, run by this Python."""
    # Without -P a folder named `service` in the working directory would hide this package.
    options = [] if Path.cwd() == PACKAGE.parent else ["-P"]
    return [sys.executable, *options, "-m", f"{NAME}.cli"]


def _stages(
    settings: Settings, admin: Path | int, sockets: tuple[Path, ...], engines: Sequence[Watch]
) -> tuple[Stage, ...]:
    """One stage for engines and services, which serve only after an engine has loaded."""

    async def have_loaded() -> bool:
        return all(engine.is_ready for engine in engines) and await _are_serving(sockets)

    async def has_found_all() -> bool:
        return await _answers_health(settings, admin) and await _finds(len(sockets), admin)

    return (
        Stage(f"loading {settings.model_id}", have_loaded),
        Stage("starting Envoy", has_found_all),
    )


def envoy_command(
    settings: Settings, directory: Path, *, is_told: bool = False, sockets: tuple[Path, ...] = ()
) -> list[str]:
    """Writes and checks Envoy's configuration; returns the command that runs it.

    Args:
        settings: of the server.
        directory: where to write.
        is_told: whether Envoy will be told of new certificates, see `gateway.write`.
        sockets: of several service processes, see `Settings.gateway_config`.

    Raises:
        ValueError: Envoy refuses its configuration, or a certificate cannot be used.
        FileNotFoundError: there is no Envoy.
    """
    check_public_certificates(settings)
    binary = gateway.find_envoy()
    admin_socket = None if settings.admin_port is not None else directory / _ADMIN_SOCKET
    traces = settings.trace_export(os.environ)
    config = settings.gateway_config(DESCRIPTORS, admin_socket, traces, sockets)
    config_path = gateway.write(config, directory, is_told=is_told)
    gateway.validate(binary, config_path)
    return gateway.command(binary, config_path, json_output=settings.json_output)


def following_servers(
    settings: Settings, directory: Path
) -> Callable[[], Coroutine[Any, Any, None]] | None:
    """What tells the Envoy in `directory` where its servers are; None if that does not change."""
    if (path := settings.service_endpoints_file) is None:
        return None
    return lambda: follow_endpoints(path, directory / gateway.ENDPOINTS_FILE)


def envoy_configuration(settings: Settings) -> str:
    """Returns Envoy's configuration as text."""
    traces = settings.trace_export(os.environ)
    return gateway.render(settings.gateway_config(DESCRIPTORS, traces=traces))


@contextlib.contextmanager
def held_ports(settings: Settings) -> Iterator[Settings]:
    """Yields the settings with port 0 replaced by a free port; checks that the others are free.

    Nobody else is given the ports until children listen there, and when these are started again.

    Raises:
        OSError: a port is in use, or cannot be used.
    """
    with contextlib.ExitStack() as held:
        port = held.enter_context(_bound(settings.hostname, settings.port))
        grpc_port = held.enter_context(_bound(settings.grpc_host, settings.grpc_port))
        if settings.admin_port:
            held.enter_context(_bound("127.0.0.1", settings.admin_port))
        if port == grpc_port:
            raise OSError(f"port {port} is asked for twice, as port and as grpc_port")
        yield replace(settings, port=port, grpc_port=grpc_port)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[int]:
    """Binds a port and yields its number; never listens, so that no client can connect."""
    name = f"port {port} on {host}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(f"{name} cannot be used: {error.strerror}") from error
    with socket.socket(family, kind) as sock:
        # A port whose last connections are still closing may be used, but not chosen.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(port != 0))
        try:
            sock.bind(address)
        except PermissionError as error:
            raise OSError(f"{name} needs more privileges") from error
        except OSError as error:
            in_use = "is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise OSError(f"{name} {in_use}") from error
        # So that a child can listen here, beside this socket.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield sock.getsockname()[1]


async def is_serving(target: str) -> bool:
    """Whether the service at this address reports by grpc.health.v1 that it serves."""
    import grpc.aio  # here, because the commands that do not probe need no gRPC
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=_PROBE_S)
        except grpc.aio.AioRpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _are_serving(sockets: tuple[Path, ...]) -> bool:
    """Whether all service processes serve."""
    return all(await asyncio.gather(*(is_serving(f"unix:{path}") for path in sockets)))


async def _finds(count: int, admin: Path | int) -> bool:
    """Whether Envoy has found so many service processes well: if one dies, it needs another one."""
    try:
        return count < 2 or await envoy_admin.num_healthy(admin) >= count
    except OSError:
        return False


async def _answers_health(settings: Settings, admin: Path | int) -> bool:
    """Whether `GET /health` on the public port is answered with 200, as far as we may ask.

    Where that needs an API key, the service answers 401. Where callers need a certificate, the
    handshake is all that we get of the port, so Envoy itself is asked how it finds the service.
    """
    try:
        async with asyncio.timeout(_PROBE_S), _connection(settings) as (reader, writer):
            if settings.tls_client_ca is not None:
                return await envoy_admin.num_healthy(admin) > 0
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status_line = await reader.readline()
    except OSError:  # a timeout and a failed handshake are also of this kind
        return False
    well = {b"200"} if settings.api_key_file is None else {b"200", b"401"}
    return not well.isdisjoint(status_line.split(b" ")[1:2])


@contextlib.asynccontextmanager
async def _connection(
    settings: Settings,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context = None
    if settings.tls_certificate is not None:
        context = ssl.create_default_context()
        context.check_hostname = False  # whether it answers matters, not who it is
        context.verify_mode = ssl.CERT_NONE
    host = reachable(settings.hostname)
    reader, writer = await asyncio.open_connection(host, settings.port, ssl=context)
    try:
        yield reader, writer
    finally:
        writer.close()


def _addresses(settings: Settings) -> dict[str, str]:
    """Where the server is reached, and with what model."""
    scheme = "http" if settings.tls_certificate is None else "https"
    return {
        "rest": f"{scheme}://{address(reachable(settings.hostname), settings.port)}",
        "grpc": address(settings.upstream_host, settings.grpc_port),
        "model": settings.model_id,
    }


def _banner(settings: Settings) -> str:
    addresses = _addresses(settings)
    rest, direct = addresses["rest"], addresses["grpc"]
    chat = {
        "messages": [{"role": "user", "content": "What is Deep Learning?"}],
        "max_tokens": 60,
        "stream": True,
    }
    generate = {"inputs": "What is Deep Learning?", "parameters": {"max_new_tokens": 20}}
    # Where callers need more, it is asked for in the words of the tools.
    key = "" if settings.api_key_file is None else ' -H "Authorization: Bearer $API_KEY"'
    curl = f"curl -N{_certificate_flags(settings.tls, '--cacert', '--cert', '--key')}"
    talk = _certificate_flags(settings.tls, "--tls-ca", "--tls-cert", "--tls-key")
    grpcurl = "grpcurl" + (
        _certificate_flags(settings.grpc_tls, "-cacert", "-cert", "-key") or " -plaintext"
    )
    return f"""
Tokenwire is ready.

  REST     {rest}
  gRPC     {direct}
  metrics  {rest}/metrics
  model    {settings.model_id}

Try it:

  {curl} {rest}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{json.dumps(chat)}'

  {grpcurl}{key} -d '{json.dumps(generate)}' \\
    {direct} {SERVICE}/Generate

or type: tokenwire chat --target {rest}{talk}

"""


def _certificate_flags(tls: TlsFiles | None, ca: str, certificate: str, key: str) -> str:
    """The flags of a client; the names of its files are for the caller to fill in."""
    if tls is None:
        return ""
    own = "" if tls.client_ca is None else f" {certificate} CLIENT.pem {key} CLIENT.key"
    return f" {ca} CA.pem{own}"
