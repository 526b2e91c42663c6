"""Grammars that are made to cost much: they must cost only the request that sends them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest

from tests.e2e.grammars import BY_SCHEMA, check, generate, ids
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, Stack, running


def nested(depth: int) -> dict[str, Any]:
    """A schema of objects nested to this depth."""
    value: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"x": value}}
    return value


WIDE = {f"k{i}": {"enum": [f"v{i}_{j}" for j in range(20)]} for i in range(1200)}
# Each of these would take seconds, or much memory, or is not a grammar at all.
POISON: list[dict[str, Any]] = [
    # Slow to compile, with growing memory.
    {"type": "json", "value": {"type": "integer", "multipleOf": 9999991}},
    {"type": "json", "value": {"type": "integer", "multipleOf": 9999973}},
    {"type": "json", "value": {"type": "array", "items": {"multipleOf": 9999971}}},
    # Huge masks.
    {"type": "regex", "value": "a{100000}"},
    {"type": "regex", "value": "a{150000}"},
    {"type": "json", "value": {"type": "object", "properties": WIDE}},
    # Huge, deep or invalid.
    {"type": "regex", "value": "a" * 300_000},
    {"type": "json", "value": json.dumps(nested(100))},
    {"type": "json", "value": {"minimum": 1e300}},
    {"type": "json", "value": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"type": "regex", "value": "((((((["},
]
UNTRIED = (6, 7)  # indices in POISON: too large or too deep, refused without trying them
STATUSES = {grpc.StatusCode.INVALID_ARGUMENT: 422, grpc.StatusCode.RESOURCE_EXHAUSTED: 429}
NUM_STREAMS = 32
NUM_TOKENS = 500  # of the streams that run to their end
MAX_TOKENS = 2000  # of those that are left before


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server with room for all streams, which gives a grammar one second."""
    flags = ("--grammar-deadline-seconds=1", "--max-batch-total-tokens=70000")
    with running(tmp_path_factory.mktemp("poison") / "log", *flags) as stack:
        yield stack


def read_stream(server: Stack, number: int, over: threading.Event) -> tuple[list[int], str | None]:
    """Reads a stream: with an odd number to its end, with an even one until `over` is set.

    Returns:
        The token ids, and the finish reason; None if the stream was left.
    """
    leaves = number % 2 == 0
    max_new_tokens = MAX_TOKENS if leaves else NUM_TOKENS
    parameters = {**ENDLESS, "max_new_tokens": max_new_tokens, "details": True}
    body = {"inputs": PROMPT, "parameters": parameters}
    found: list[int] = []
    with server.http.stream("POST", "/generate_stream", json=body) as reply:
        for line in filter(None, reply.iter_lines()):
            event = json.loads(line.removeprefix("data: "))
            found.append(event["token"]["id"])
            if event["details"] is not None:
                return found, str(event["details"]["finish_reason"])
            if leaves and over.is_set():
                return found, None
    raise AssertionError("a stream without its end")


def send(
    server: Stack, api: ReflectionClient, number: int, grammar: dict[str, Any]
) -> tuple[int, str]:
    """Sends a grammar, by turns over REST and gRPC; returns its HTTP status and the error."""
    body = {"inputs": PROMPT, "parameters": {"grammar": grammar}}
    if number % 2:
        with pytest.raises(grpc.RpcError) as failed:
            api.call("Generate", body)
        return STATUSES[failed.value.code()], str(failed.value.details())
    reply = server.http.post("/generate", json=body)
    return reply.status_code, reply.text


def run_beside_streams(
    server: Stack, api: ReflectionClient
) -> tuple[list[tuple[list[int], str | None]], list[tuple[int, str]]]:
    """Sends all of `POISON` while streams run; what `read_stream` and `send` returned."""
    over = threading.Event()
    with ThreadPoolExecutor(NUM_STREAMS + len(POISON)) as pool:
        streams = [pool.submit(read_stream, server, number, over) for number in range(NUM_STREAMS)]
        try:
            server.wait_until_running(NUM_STREAMS)
            sent = [pool.submit(send, server, api, *item) for item in enumerate(POISON)]
            answers = [item.result() for item in sent]
            assert generate(server, BY_SCHEMA)["details"]["finish_reason"] == "eos_token"
        finally:
            over.set()
        return [item.result() for item in streams], answers


def pids(server: Stack) -> dict[str, int]:
    """The process ids of the children."""
    return {name: server.child(name).pid for name in ("engine", "service", "envoy")}


class TestPoison:
    """A grammar costs only the request that sends it."""

    def test_running_streams_are_not_disturbed(self, server: Stack) -> None:
        api = ReflectionClient(server.through_envoy)
        api.describe()  # reads the descriptors before several threads use the client
        before = pids(server)
        server.http = _with_connections(server, NUM_STREAMS + len(POISON))
        parameters = {**ENDLESS, "max_new_tokens": NUM_TOKENS}
        alone = ids(server.generate(**parameters)["details"]["tokens"])
        streams, answers = run_beside_streams(server, api)
        # A machine under full load answers "try again" instead of blaming the grammar.
        assert {status for status, _ in answers} <= set(STATUSES.values()), answers
        assert [answers[number][0] for number in UNTRIED] == [422] * len(UNTRIED), answers
        for number, (found, reason) in enumerate(streams):
            expected = "length" if number % 2 else None
            assert reason == expected or len(found) == MAX_TOKENS
            size = min(len(found), len(alone))
            assert found[:size] == alone[:size]
        server.wait_until_idle()
        assert server.is_healthy()
        assert pids(server) == before

    def test_grammar_that_passes_the_check_fails_only_its_own_request(self, server: Stack) -> None:
        # What a grammar costs also depends on the tokens of the text, so no check finds everything.
        grammar = {"type": "regex", "value": "(((a{1,300}){1,300}){1,300})"}
        body = {"inputs": PROMPT, "parameters": {"grammar": grammar, "max_new_tokens": 50}}
        reply = server.http.post("/generate", json=body)
        assert reply.status_code in (200, 422, 424)
        check(generate(server, BY_SCHEMA)["generated_text"])


def _with_connections(server: Stack, count: int) -> httpx.Client:
    """A client that `count` threads can use at the same time."""
    server.http.close()
    limits = httpx.Limits(max_connections=count + 10)
    return httpx.Client(base_url=server.url, timeout=DEADLINE_S, limits=limits)
