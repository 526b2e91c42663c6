"""A `tokenwire serve` on free ports, and clients that record when the tokens of a stream arrive."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx

from benchmarks.load import Item
from service.pb.tokenwire.v1 import GenerateParameters, GenerateRequest

METHOD = "/tokenwire.v1.TextGenerationService/GenerateStream"
_READY_S = 180.0
_LAST_LINES = 5  # of a server that does not start
_LAST_WORDS_S = 5.0  # a process that it has left behind may hold the pipe


@asynccontextmanager
async def server(model_path: Path, *flags: str) -> AsyncIterator[tuple[str, str]]:
    """Runs `tokenwire serve` with more flags; yields its REST URL and its gRPC address."""
    port, grpc_port = free_port(), free_port()
    command = [
        *(sys.executable, "-m", "service.cli", "serve"),
        *(f"--model-id={model_path}", f"--port={port}", "--log-level=warning"),
        *flags,
    ]
    environment = {**os.environ, "TOKENWIRE_GRPC_PORT": str(grpc_port)}
    async with process(command, f"http://127.0.0.1:{port}", environment) as url:
        yield url, f"127.0.0.1:{grpc_port}"


@asynccontextmanager
async def process(
    command: list[str], url: str, environment: dict[str, str] | None = None
) -> AsyncIterator[str]:
    """Runs a process for the length of a block, which starts once `url`/health answers.

    Raises:
        RuntimeError: the process ended; the message has what it said last.
        TimeoutError: it did not answer in time.
    """
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said: deque[str] = deque(maxlen=_LAST_LINES)
    reader = threading.Thread(target=_pass_on, args=(running, said), daemon=True)
    reader.start()
    try:
        try:
            await asyncio.to_thread(wait_until_ready, url, running)
        except RuntimeError as error:
            reader.join(_LAST_WORDS_S)
            raise RuntimeError(f"{error}: {''.join(said).strip()}") from error
        yield url
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait()
        reader.join(_LAST_WORDS_S)


def _pass_on(running: subprocess.Popen[str], said: deque[str]) -> None:
    """Shows what a process writes to its standard error, and keeps the last lines."""
    assert running.stderr is not None
    for line in running.stderr:
        sys.stderr.write(line)
        said.append(line)


def free_port() -> int:
    """A port that is free now; another process may still take it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(url: str, running: subprocess.Popen[str]) -> None:
    """Polls /health until it answers.

    Raises:
        RuntimeError: the process ended.
        TimeoutError: it did not answer in time.
    """
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if running.poll() is not None:
            raise RuntimeError("the server did not start")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError("the server is not ready")


def words(ids: list[int]) -> str:
    """The text of a prompt of `random_model`."""
    return " ".join(f"w{index}" for index in ids)


async def grpc_stream(channel: grpc.aio.Channel, item: Item) -> list[float]:
    """Arrival times of the tokens of a gRPC stream, in seconds of `time.perf_counter`."""
    request = GenerateRequest(
        inputs=words(item.prompt), parameters=GenerateParameters(max_new_tokens=item.new_tokens)
    )
    call = channel.unary_stream(METHOD, None, None)(bytes(request))
    return [time.perf_counter() async for _ in call]


async def rest_stream(client: httpx.AsyncClient, item: Item) -> list[float]:
    """Arrival times of the tokens of a REST stream, in seconds of `time.perf_counter`."""
    body = {"inputs": words(item.prompt), "parameters": {"max_new_tokens": item.new_tokens}}
    arrivals = []
    async with client.stream("POST", "/generate_stream", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                arrivals.append(time.perf_counter())
    return arrivals


def http_client(url: str) -> httpx.AsyncClient:
    """A client without limits on connections and time."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits)
