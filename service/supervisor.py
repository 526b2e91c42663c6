"""Runs engine, service and Envoy as children: starts, watches, restarts and drains them.

To the supervisor a child is a name and a command. Torch is never loaded here, and gRPC only by the
probe that uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import gateway
from .settings import Settings, reachable, without_settings

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[1]
_DESCRIPTORS = Path(__file__).with_name("pb") / "descriptors.binpb"
_POLL_S = 0.1  # between two probes
_PROBE_S = 5.0  # a probe that takes longer has failed
_TAIL_LINES = 20
_CHUNK_BYTES = 64 * 1024
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# How long each child may take to end, after the service has drained.
_STOP_S = 10.0
# In this order: the service ends its calls while Envoy still carries them and the engine computes.
_STOP_ORDER = ("service", "envoy", "engine")

Probe = Callable[[], Awaitable[bool]]


class SupervisorError(Exception):
    """The server could not be started or kept running; `str()` is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a child that died is started again. Times are seconds.

    Attributes:
        first_delay: the delay after the first death; each further one doubles it.
        max_delay: the longest delay.
        healthy_after: a child that lived this long starts from the first delay again.
        max_deaths: this many deaths in a row within `window` end the server.
        window: see `max_deaths`.
    """

    first_delay: float = 0.1
    max_delay: float = 5.0
    healthy_after: float = 30.0
    max_deaths: int = 5
    window: float = 60.0

    def delay(self, num_deaths: int) -> float:
        """Returns the delay after so many deaths in a row."""
        doublings = min(num_deaths - 1, 30)  # far beyond any delay, and still a float
        return min(self.first_delay * 2**doublings, self.max_delay)

    def is_hopeless(self, deaths: list[float]) -> bool:
        """Whether to give up after deaths in a row at these times."""
        recent = deaths[-self.max_deaths :]
        return len(recent) == self.max_deaths and recent[-1] - recent[0] <= self.window


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of the start: what to say while it lasts, and how to see that it is over."""

    progress: str
    reached: Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a supervisor runs: commands by name, in the order of their start, and the stages."""

    commands: Mapping[str, list[str]]
    stages: tuple[Stage, ...]
    banner: str


def make_plan(settings: Settings, runtime: Path) -> Plan:
    """Returns the plan for the real processes, with Envoy's configuration written and checked.

    Raises:
        ValueError: Envoy refuses its configuration.
        FileNotFoundError: there is no Envoy.
    """
    settings = replace(settings, engine_socket=settings.engine_socket or runtime / "engine.sock")
    # Without -P a folder named `service` where the user stands would be taken for this package.
    python = [sys.executable, *([] if Path.cwd() == _ROOT else ["-P"]), "-m", "service.cli"]
    return Plan(
        commands={
            "engine": [*python, "engine", *settings.to_argv()],
            "service": [*python, "service", *settings.to_argv()],
            "envoy": envoy_command(settings, runtime),
        },
        stages=(
            Stage(
                f"loading {settings.model_id}",
                lambda: is_serving(settings.upstream_host, settings.grpc_port),
            ),
            Stage("starting Envoy", lambda: _answers_health(settings)),
        ),
        banner=_banner(settings),
    )


def envoy_command(settings: Settings, directory: Path) -> list[str]:
    """Writes and checks Envoy's configuration; returns the command that runs it.

    Raises:
        ValueError: Envoy refuses its configuration.
        FileNotFoundError: there is no Envoy.
    """
    binary = gateway.find_envoy()
    config_path = directory / "envoy.yaml"
    config_path.write_text(envoy_configuration(settings), encoding="utf-8")
    gateway.validate(binary, config_path)
    return gateway.command(binary, config_path)


def envoy_configuration(settings: Settings) -> str:
    """Returns Envoy's configuration as text."""
    return gateway.render(settings.gateway_config(_DESCRIPTORS))


class Supervisor:
    """Runs one server until it is told to stop.

    Args:
        settings: what the server is started with.
        plan: makes the plan, in a thread, once the private directory is there.
        policy: when children are restarted.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        plan: Callable[[Settings, Path], Plan] = make_plan,
        policy: RestartPolicy | None = None,
    ) -> None:
        self._settings = settings
        self._make_plan = plan
        self._policy = policy or RestartPolicy()
        self._children: list[Child] = []
        self._stopping = asyncio.Event()
        self._num_signals = 0

    async def run(self) -> int:
        """Returns the exit code: 0 after a clean drain, 1 after a second signal.

        Raises:
            SupervisorError: a child failed at the start, or too often later.
            OSError: a port cannot be had, or there is no Envoy.
            ValueError: Envoy refuses its configuration.
        """
        settings = with_ports(self._settings)
        with _private_directory() as runtime, self._signals():
            plan = await asyncio.to_thread(self._make_plan, settings, runtime)
            environment = without_settings(os.environ)
            self._children = [
                Child(name, command, environment) for name, command in plan.commands.items()
            ]
            patience = 0.0
            try:
                await self._start(plan)
                await _first(self._stopping.wait(), *map(self._keep_alive, self._children))
                patience = settings.drain_seconds
            finally:
                await self._stop(patience)
        return 0 if self._num_signals < 2 else 1

    async def _start(self, plan: Plan) -> None:
        """Starts the children and waits until the last stage is reached, or a signal."""
        for child in self._children:
            await child.start()
        await _first(
            self._stopping.wait(),
            _reach(plan.stages),
            *map(_fail_on_exit, self._children),
        )
        if not self._stopping.is_set():
            sys.stdout.write(plan.banner)
            sys.stdout.flush()

    async def _keep_alive(self, child: Child) -> None:
        """Restarts a child whenever it ends; raises when that is hopeless."""
        deaths: list[float] = []
        while True:
            await child.wait()
            if child.age() >= self._policy.healthy_after:
                deaths.clear()
            deaths.append(time.monotonic())
            if self._policy.is_hopeless(deaths):
                raise SupervisorError(f"giving up after {len(deaths)} deaths: {child.ending()}")
            delay = self._policy.delay(len(deaths))
            logger.error("%s; restarting it in %.1f s", child.ending(), delay)
            await asyncio.sleep(delay)
            await child.start()

    async def _stop(self, patience: float) -> None:
        """Ends the children one after the other; `patience` is for the service's calls."""
        rank = {name: place for place, name in enumerate(_STOP_ORDER)}
        for child in sorted(self._children, key=lambda child: rank.get(child.name, 0)):
            await child.stop(_STOP_S + (patience if child.name == _STOP_ORDER[0] else 0))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        self._num_signals += 1
        self._stopping.set()
        if self._num_signals == 1:
            logger.info("%s: draining; once more to stop at once", number.name)
            return
        for child in self._children:
            child.kill()


class Child:
    """One child process in a session of its own; it dies with this process."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._relay: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._started = 0.0
        self._ended: float | None = None

    async def start(self) -> None:
        """Starts the process, whether or not there was one before."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # the terminal's Ctrl-C is for the supervisor alone
            preexec_fn=_die_with_parent(os.getpid()),
        )
        self._started, self._ended = time.monotonic(), None
        self._tail.clear()
        assert self._process.stderr is not None
        self._relay = asyncio.create_task(self._relay_stderr(self._process.stderr))

    async def wait(self) -> None:
        """Returns when the process has ended and its last words are known."""
        assert self._process is not None and self._relay is not None
        await self._process.wait()
        if self._ended is None:
            self.kill()  # what it left behind, which may hold memory, and the pipe below
            self._ended = time.monotonic()
        await asyncio.wait([self._relay], timeout=1)

    async def stop(self, patience: float) -> None:
        """Asks the process to end, and kills it with all its own after `patience` seconds."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), patience)
        except TimeoutError:
            logger.error("%s did not end within %.0f s; killing it", self.name, patience)
            self.kill()
        await self.wait()

    def kill(self) -> None:
        """Kills the process and those it started, unless `wait` has seen to that."""
        if self._process is not None and self._ended is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def age(self) -> float:
        """How long the process lived, or has lived so far, in seconds."""
        return (self._ended or time.monotonic()) - self._started

    def ending(self) -> str:
        """Says how the process ended, with its last line on stderr."""
        assert self._process is not None
        how = _ending(self._process.returncode)
        words = self._tail[-1].removeprefix(f"tokenwire {self.name}: ") if self._tail else ""
        return f"{self.name} {how}: {words}" if words else f"{self.name} {how}"

    async def _relay_stderr(self, stream: asyncio.StreamReader) -> None:
        """Passes on whole lines, so that those of two children do not mix."""
        rest = b""
        while chunk := await stream.read(_CHUNK_BYTES):
            rest += chunk
            # A progress bar ends its lines with \r; what has no end at all is cut somewhere.
            end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
            end = len(rest) if end == 0 and len(rest) > _CHUNK_BYTES else end
            self._pass_on(rest[:end])
            rest = rest[end:]
        self._pass_on(rest)

    def _pass_on(self, output: bytes) -> None:
        text = output.decode(errors="replace")
        sys.stderr.write(text)
        sys.stderr.flush()
        self._tail.extend(line for line in map(str.strip, text.splitlines()) if line)


def with_ports(settings: Settings) -> Settings:
    """Returns the settings with port 0 replaced by a free port, after a look at the others.

    Raises:
        OSError: a port is in use, or not for us.
    """
    with contextlib.ExitStack() as held:  # held together, so that no port is chosen twice
        port = held.enter_context(_bound(settings.hostname, settings.port))
        grpc_port = held.enter_context(_bound(settings.grpc_host, settings.grpc_port))
        if settings.admin_port:
            held.enter_context(_bound("127.0.0.1", settings.admin_port))
        if port == grpc_port:
            raise OSError(f"port {port} is asked for twice, as port and as grpc_port")
        return replace(settings, port=port, grpc_port=grpc_port)


async def is_serving(host: str, port: int) -> bool:
    """Whether the service at this address says by grpc.health.v1 that it serves."""
    import grpc.aio  # here, so that a supervisor that only starts children is light
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(_address(host, port)) as channel:
        request = health_pb2.HealthCheckRequest(service=gateway.SERVICE)
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=_PROBE_S)
        except grpc.aio.AioRpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _answers_health(settings: Settings) -> bool:
    """Whether `GET /health` on the public port is answered with 200."""
    try:
        async with asyncio.timeout(_PROBE_S), _connection(settings) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status_line = await reader.readline()
    except OSError:  # a timeout and a failed handshake are also of this kind
        return False
    return status_line.split(b" ")[1:2] == [b"200"]


@contextlib.asynccontextmanager
async def _connection(
    settings: Settings,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context = None
    if settings.tls_certificate is not None:
        context = ssl.create_default_context()
        context.check_hostname = False  # it is asked whether it answers, not who it is
        context.verify_mode = ssl.CERT_NONE
    host = reachable(settings.hostname)
    reader, writer = await asyncio.open_connection(host, settings.port, ssl=context)
    try:
        yield reader, writer
    finally:
        writer.close()


async def _reach(stages: tuple[Stage, ...]) -> None:
    """Goes through the stages, saying where it is, and repeating it when it takes long."""
    for stage in stages:
        started = said = time.monotonic()
        logger.info("%s ...", stage.progress)
        while not await stage.reached():
            await asyncio.sleep(_POLL_S)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                logger.info("%s ... (%.0f s)", stage.progress, said - started)


async def _fail_on_exit(child: Child) -> None:
    await child.wait()
    raise SupervisorError(child.ending())


async def _first(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Runs all until one ends, cancels the others, and raises what an ended one raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@contextlib.contextmanager
def _private_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tokenwire-"))  # mode 0700
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[int]:
    """Holds a port and tells its number; never listens, so that nobody's call is lost."""
    place = f"port {port} on {host}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(f"{place} cannot be used: {error.strerror}") from error
    with socket.socket(family, kind) as sock:
        # A port whose last connections are still closing may be used, but not chosen.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(port != 0))
        try:
            sock.bind(address)
        except PermissionError as error:
            raise OSError(f"{place} needs more privileges") from error
        except OSError as error:
            in_use = "is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise OSError(f"{place} {in_use}") from error
        yield sock.getsockname()[1]


def _die_with_parent(parent: int) -> Callable[[], None] | None:
    """Returns what a child does before exec so that it outlives its parent under no signal."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: a forked child should do next to nothing

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before the line above
            os._exit(1)

    return die_with_parent


def _ending(returncode: int | None) -> str:
    if returncode is None or returncode >= 0:
        return f"ended with status {returncode}"
    if returncode == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"was ended by {signal.Signals(-returncode).name}"


def _banner(settings: Settings) -> str:
    scheme = "http" if settings.tls_certificate is None else "https"
    rest = f"{scheme}://{_address(reachable(settings.hostname), settings.port)}"
    direct = _address(settings.upstream_host, settings.grpc_port)
    chat = {
        "messages": [{"role": "user", "content": "What is gRPC?"}],
        "max_tokens": 60,
        "stream": True,
    }
    generate = {"inputs": "What is gRPC?", "parameters": {"max_new_tokens": 20}}
    return f"""
Tokenwire is ready.

  REST     {rest}
  gRPC     {direct}
  metrics  {rest}/metrics
  model    {settings.model_id}

Try it:

  curl -N {rest}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{json.dumps(chat)}'

  grpcurl -plaintext -d '{json.dumps(generate)}' \\
    {direct} {gateway.SERVICE}/Generate

or in Python: python examples/grpc_client.py

"""


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
