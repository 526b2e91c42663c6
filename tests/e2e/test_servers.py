"""Whole servers behind one Envoy: one that is lost costs its streams and nothing else.

By default each way to lose one is tried on one of three servers; with ALL_REPLICAS=1 on each of
them, in turn. The servers have no model (`fleet.py`): what is tested is how Envoy and services go
together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from service.bundled import DESCRIPTORS
from service.launch.edge import Edge
from service.launch.sources import load
from tests.callers import Callers
from tests.e2e.fleet import Server
from tests.e2e.stack import DEADLINE_S, SERVICE, wait_until
from tests.envoy.fake_service import Messages, serialize
from tests.envoy.gateway import run_envoy
from tests.envoy.lone_gateway import lone_gateway

NUM_SERVERS, NUM_SESSIONS = 3, 24  # so many that each server has some
NUMBERS = range(NUM_SERVERS)
# Each way to lose a server, and how an Envoy that goes on chooses others.
WAYS = (("kill", ()), ("freeze", ("session",)), ("terminate", ()))
TRIED = [
    (*way, number)
    for first, way in enumerate(WAYS)
    for number in (NUMBERS if os.environ.get("ALL_REPLICAS") else [first])
]
# Sooner than by default, where a test would wait for half a minute.
EDGE = Edge(server_ping_s=0.2, server_answer_s=2, ejection_s=0.2)
LONG = {"prompt": "x", "max_tokens": 100_000, "stream": True}
SHORT = {"prompt": "x", "max_tokens": 3}


@dataclass(frozen=True)
class Front:
    """An Envoy with servers behind it."""

    target: str
    http: httpx.Client
    admin: str = ""

    def ask(self, session: str) -> str:
        """The server that answers a short call."""
        reply = self.http.post("/v1/completions", json=SHORT, headers={"x-session-id": session})
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        assert answer["usage"]["completion_tokens"] == SHORT["max_tokens"]
        return str(answer["model"])

    def num_healthy(self) -> int:
        """The servers that Envoy has found well."""
        name = "cluster.service.membership_healthy"
        url = f"http://{self.admin}/stats?format=json&filter=^{name}$"
        return int(httpx.get(url, trust_env=False).json()["stats"][0]["value"])


@contextlib.contextmanager
def client(target: str) -> Iterator[httpx.Client]:
    """A REST client of a front."""
    url = f"http://{target}"
    with httpx.Client(base_url=url, timeout=DEADLINE_S, trust_env=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Three servers."""
    directory = tmp_path_factory.mktemp("servers")
    started = [Server(directory, f"server-{number}") for number in NUMBERS]
    yield started
    for server in started:
        server.kill()


@contextlib.contextmanager
def front(servers: list[Server], directory: Path, affinity: tuple[str, ...]) -> Iterator[Front]:
    """The Envoy of `tokenwire envoy --service-addresses`, which notices sooner what is lost."""
    addresses = tuple(str(server.address) for server in servers)
    given = {"service_addresses": addresses, "server_affinity": affinity}
    config = replace(load(given, {}).gateway_config(DESCRIPTORS), edge=EDGE)
    with run_envoy(config, directory) as (port, admin):
        target = f"127.0.0.1:{port}"
        with client(target) as http:
            made = Front(target, http, admin)
            wait_until(lambda: made.num_healthy() == NUM_SERVERS, "all servers")
            yield made


def asking(front: Front) -> Callers:
    """Callers of a front, each call in a session of its own."""
    return Callers(lambda number: front.ask(f"call {number}"))


class Stream:
    """A stream that does not end by itself, read as it comes, over one of two protocols.

    Attributes:
        server: that it comes from.
        num_read: pieces of it so far.
        end: how it ended: the text of an error event, or what the client raised.
    """

    def __init__(self, session: str) -> None:
        self.session = session
        self.server = ""
        self.num_read = 0
        self.end: Exception | str | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_until(lambda: self.server != "", "the stream begins")

    def close(self) -> None:
        """Leaves."""
        self._leave()
        self._thread.join()

    def wait_for_more(self) -> None:
        """Returns once it has gone on."""
        before = self.num_read
        wait_until(lambda: self.num_read > before, "the stream goes on")

    def _read(self) -> None:
        try:
            for server in self._pieces():
                self.server, self.num_read = server, self.num_read + 1
        except (grpc.RpcError, httpx.HTTPError) as error:
            self.end = error

    def _pieces(self) -> Iterator[str]:
        """The server's name, for each piece."""
        raise NotImplementedError

    def _leave(self) -> None:
        raise NotImplementedError


class GrpcStream(Stream):
    """Over gRPC."""

    def __init__(self, channel: grpc.Channel, session: str) -> None:
        messages = Messages()
        method = messages.service.methods_by_name["Completions"]
        stub = channel.unary_stream(
            f"/{SERVICE}/Completions",
            request_serializer=serialize,
            response_deserializer=messages.parser(method.output_type),
        )
        request = messages.new("CompletionsRequest", **{**LONG, "prompt": [LONG["prompt"]]})
        self._call = stub(request, metadata=(("x-session-id", session),))
        super().__init__(session)

    def _pieces(self) -> Iterator[str]:
        for piece in self._call:
            yield piece.completion.model

    def _leave(self) -> None:
        self._call.cancel()


class RestStream(Stream):
    """Over REST."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http = http
        self._leaves = False
        super().__init__(session)

    def _pieces(self) -> Iterator[str]:
        head = {"x-session-id": self.session}
        with self._http.stream("POST", "/v1/completions", json=LONG, headers=head) as reply:
            for line in reply.iter_lines():
                if self._leaves:
                    return
                if line.startswith("data: {"):  # neither blank nor [DONE]
                    event = json.loads(line.removeprefix("data:"))
                    if "error" in event:
                        self.end = str(event["error"])
                    else:
                        yield event["model"]

    def _leave(self) -> None:
        self._leaves = True


@contextlib.contextmanager
def streams_of(
    start: Callable[[str], Stream], servers: list[Server]
) -> Iterator[dict[str, Stream]]:
    """A stream from each of the servers, by its name."""
    streams: dict[str, Stream] = {}
    with contextlib.ExitStack() as stack:
        for session in itertools.count():
            stream = start(f"stream {session}")
            stack.callback(stream.close)
            streams[stream.server] = stream
            if len(streams) == len(servers):
                break
        yield streams


def assert_ended(grpc_end: Any, rest_end: Any, way: str) -> None:
    """Streams of a server that was told to end say so; those of a lost one break off."""
    if way == "terminate":
        assert grpc_end.code() is grpc.StatusCode.ABORTED
        assert "shutting down" in rest_end
    else:
        assert grpc_end.code() is grpc.StatusCode.INTERNAL  # the stream was reset
        assert isinstance(rest_end, httpx.RemoteProtocolError)  # without the last chunk


@pytest.mark.parametrize(("way", "affinity", "number"), TRIED)
def test_no_answer_is_lost_with_a_server_and_only_its_streams_end(
    servers: list[Server], tmp_path: Path, way: str, affinity: tuple[str, ...], number: int
) -> None:
    lost = servers[number]
    others = [server for server in servers if server is not lost]
    with (
        front(servers, tmp_path, affinity) as envoy,
        grpc.insecure_channel(envoy.target) as channel,
        streams_of(lambda session: GrpcStream(channel, session), servers) as by_grpc,
        streams_of(lambda session: RestStream(envoy.http, session), servers) as by_rest,
        asking(envoy) as callers,
    ):
        callers.wait_for_more(server.name for server in servers)
        getattr(lost, way)()
        ends = [streams[lost.name] for streams in (by_grpc, by_rest)]
        wait_until(lambda: all(stream.end is not None for stream in ends), "its streams end")
        assert_ended(*(stream.end for stream in ends), way)
        callers.wait_for_more(server.name for server in others)
        lost.thaw() if way == "freeze" else lost.start()
        callers.wait_for_more(server.name for server in servers)  # it gets calls again
        for streams in (by_grpc, by_rest):
            for server in others:
                streams[server.name].wait_for_more()
    assert not callers.errors


def test_a_session_keeps_its_server_and_has_another_one_while_that_is_gone(
    servers: list[Server], tmp_path: Path
) -> None:
    with front(servers, tmp_path, ("session",)) as envoy:

        def homes() -> dict[str, str]:
            return {name: envoy.ask(name) for name in map(str, range(NUM_SESSIONS))}

        before = homes()
        assert set(before.values()) == {server.name for server in servers}
        # On a busy machine Envoy may take a server for a lost one, for a moment.
        wait_until(lambda: homes() == before, "all sessions stay where they are")
        servers[0].kill()
        assert servers[0].name not in homes().values()
        # Until Envoy knows that it is gone, each call is tried there first, and again elsewhere.
        wait_until(lambda: homes() == homes(), "they stay there")
        servers[0].start()
        wait_until(lambda: homes() == before, "all sessions are where they were")


def test_servers_come_and_go_by_a_file_and_nobody_notices(
    servers: list[Server], tmp_path: Path
) -> None:
    path = tmp_path / "addresses"

    def name(listed: list[Server]) -> None:
        """Names the servers, as the documentation says."""
        new = path.with_suffix(".new")
        new.write_text("".join(f"{server.address}\n" for server in listed))
        new.replace(path)

    first, second, third = servers
    name([first, second])
    settings = {"TOKENWIRE_SERVICE_ENDPOINTS_FILE": str(path)}
    with (
        lone_gateway(first.address.port, tmp_path, **settings) as gateway,
        client(f"127.0.0.1:{gateway.port}") as http,
        streams_of(lambda session: RestStream(http, session), [first, second]) as streams,
        asking(Front(f"127.0.0.1:{gateway.port}", http)) as callers,
    ):
        callers.wait_for_more([first.name, second.name])
        assert third.name not in callers.answers
        name([first, second, third])
        callers.wait_for_more([third.name])
        name([second, third])
        wait_until(lambda: callers.has_left(first.name), "the first one gets no more calls")
        callers.wait_for_more([second.name, third.name])
        streams[first.name].wait_for_more()
        streams[second.name].wait_for_more()
    assert not callers.errors
