"""A real server, started as users start it: `tokenwire serve`, with access to its state."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from service.launch.sources import without_settings

SERVICE = "tokenwire.v1.TextGenerationService"
START_S = 180.0  # for starting; the machine may be busy
DEADLINE_S = 120.0  # for everything else that is waited for
PROMPT = "What is Deep Learning?"
TOKENWIRE = Path(sys.executable).with_name("tokenwire")

# A text that does not end by itself: at this temperature all tokens are equally likely, whatever
# the model has learnt, and the draws of this seed miss the end-of-text token.
ENDLESS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1e6,
    "seed": 2,
    "max_new_tokens": 2000,
}

# What is done in processes of low priority gets little of a busy machine, and is refused if late.
_PATIENCE = ("--tokenize-deadline-seconds=100", "--grammar-deadline-seconds=100")

_BANNER = re.compile(r"^  REST +(https?)://(\S+)\n  gRPC +(\S+)$", re.MULTILINE)


_READY = re.compile(r'"rest": "(https?)://([^"]+)", "grpc": "([^"]+)"')  # the same as JSON


def _ready(log: str) -> re.Match[str] | None:
    """What a server writes when it is ready, for people or as JSON."""
    return _BANNER.search(log) or _READY.search(log)


class StartError(Exception):
    """The server did not start; `str()` is its log."""


def command(*flags: str) -> list[str]:
    """The command line of a server on free ports; `flags` override the defaults."""
    defaults = ["--port=0", "--grpc-port=0", "--num-threads=1", "--drain-seconds=30"]
    return [str(TOKENWIRE), "serve", *defaults, "--service-workers=1", *_PATIENCE, *flags]


def run_to_end(*flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a server that is expected to end by itself."""
    return subprocess.run(
        command(*flags),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
        env=without_settings(os.environ),
    )


def wait_until(reached: Callable[[], bool], what: str, seconds: float = DEADLINE_S) -> None:
    """Polls until `reached` returns True.

    Raises:
        AssertionError: it did not return True in time; the text names `what`.
    """
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


class Stack:
    """A running server: supervisor, engine, service and Envoy.

    Args:
        log_path: the file that its output is written to.
        flags: added to the command line.
        prefix: put before the command line.
        environment: instead of this process's.
    """

    def __init__(
        self,
        log_path: Path,
        *flags: str,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log_path = log_path
        with log_path.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, *command(*flags)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=without_settings(os.environ if environment is None else environment),
            )
        self._supervisor = psutil.Process(self.process.pid)
        try:
            self._wait_for_banner()
        except BaseException:
            self.stop()
            raise
        match = _ready(self.log())
        assert match is not None
        scheme, self.address, self.grpc_address = match.groups()
        self.url = f"{scheme}://{self.address}"
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S)
        self.direct = grpc.insecure_channel(self.grpc_address)
        self.through_envoy = grpc.insecure_channel(self.address)

    def log(self) -> str:
        """The output so far."""
        return self.log_path.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        """All processes below the supervisor."""
        try:
            return self._supervisor.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def child(self, name: str) -> psutil.Process:
        """The child that runs `engine`, `service` or `envoy`."""
        (child,) = self.all_of(name)
        return child

    def all_of(self, name: str) -> list[psutil.Process]:
        """The children that run `engine`, `service` or `envoy`."""
        return [item for item in self.children() if name in _role(item)]

    def metric(self, series: str) -> float:
        """The value of a series of /metrics."""
        for line in self.http.get("/metrics").raise_for_status().text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == series:
                return float(value)
        raise KeyError(series)

    def wait_until_idle(self) -> None:
        """Returns when nothing runs or waits and every block of the cache is free."""

        def is_idle() -> bool:
            busy = ("tgi_batch_current_size", "tgi_queue_size", 'tokenwire_kv_blocks{state="used"}')
            try:
                return all(self.metric(series) == 0 for series in busy)
            except (httpx.HTTPStatusError, KeyError):
                return False  # a service just restarted, without statistics of the engine so far

        wait_until(is_idle, "an idle engine with all its blocks free")

    def wait_until_running(self, count: int) -> None:
        """Returns when at least `count` generations are in the batch."""
        wait_until(lambda: self.metric("tgi_batch_current_size") >= count, f"{count} running")

    def is_healthy(self) -> bool:
        """Whether GET /health answers 200."""
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    @contextlib.contextmanager
    def losing_engine(self) -> Iterator[None]:
        """The engine is lost within it; at the end another one serves.

        The service may not have noticed yet, and say that it is healthy.
        """
        series = "tokenwire_engine_restarts_total"
        before = self.metric(series)
        yield
        wait_until(lambda: self.is_healthy() and self.metric(series) > before, "another engine")

    @contextlib.contextmanager
    def without_engine(self) -> Iterator[None]:
        """The engine is dead within it and callers are told so; none is started before its end."""
        engine = self.child("engine")
        self._supervisor.suspend()
        try:
            engine.kill()
            wait_until(lambda: not self.is_healthy(), "an unhealthy server")
            yield
        finally:
            self._supervisor.resume()

    def generate(self, inputs: str = PROMPT, **parameters: Any) -> dict[str, Any]:
        """POST /generate with details; 8 tokens unless told otherwise."""
        parameters = {"details": True, "max_new_tokens": 8, **parameters}
        reply = self.http.post("/generate", json={"inputs": inputs, "parameters": parameters})
        assert reply.status_code == 200, reply.text
        result: dict[str, Any] = reply.json()
        return result

    def stop(self) -> None:
        """Ends all processes, whatever state they are in."""
        children = self.children()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        for name in ("direct", "through_envoy", "http"):
            if hasattr(self, name):
                getattr(self, name).close()

    def _wait_for_banner(self) -> None:
        deadline = time.monotonic() + START_S
        while _ready(self.log()) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise StartError(self.log())
            time.sleep(0.05)


@contextlib.contextmanager
def running(
    log_path: Path,
    *flags: str,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Stack]:
    """A server for the length of a block."""
    stack = Stack(log_path, *flags, prefix=prefix, environment=environment)
    try:
        yield stack
    finally:
        stack.stop()


def _role(process: psutil.Process) -> str:
    """The name of a child, from its command line; empty for other processes."""
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return ""
    if arguments and Path(arguments[0]).name == "envoy":
        return "envoy"
    return arguments[arguments.index("service.cli") + 1] if "service.cli" in arguments else ""
