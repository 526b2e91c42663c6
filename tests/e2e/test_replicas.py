"""Several engines behind one service: one that dies or freezes is invisible to callers.

By default one is killed and one is frozen; with ALL_REPLICAS=1 each of them is, in turn.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import pytest

from service.access.keys import key_line, make_key
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, Stack, running, wait_until
from tests.engine.adapters.made import make_adapter
from tests.paths import DEMO_MODEL

NUM_REPLICAS = 3
NUM_STREAMS = 6  # two per engine
NUM_TOKENS = 800  # so many that all streams are on their way when something happens
NUMBERS = range(1, NUM_REPLICAS + 1)
KILLED, FROZEN = ([*NUMBERS], [*NUMBERS]) if os.environ.get("ALL_REPLICAS") else ([2], [3])
ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 1, "target_modules": "all-linear"}
ADMIN_KEY = make_key()
# The beginning of a prompt, of more than a block, and different from all others.
BEGINNING = "A cat and a dog went to the river, and they talked about the weather of the year. " * 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server of three engines that leaves frozen ones alone for longer than a test takes.

    Admins may load the adapters `0` and `1`.
    """
    path = tmp_path_factory.mktemp("replicas")
    for seed in range(2):
        make_adapter(DEMO_MODEL, path / "adapters" / str(seed), seed, **ADAPTER)
    (path / "admin").write_text(key_line("admin", ADMIN_KEY) + "\n")
    flags = (
        f"--replicas={NUM_REPLICAS}",
        "--engine-stall-seconds=900",
        f"--lora-adapter-directory={path / 'adapters'}",
        f"--admin-key-file={path / 'admin'}",
    )
    with running(path / "log", *flags) as stack:
        yield stack


def body(seed: int, num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    """A sampled text of exactly so many tokens."""
    parameters = ENDLESS | {"seed": seed, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"inputs": PROMPT, "parameters": parameters | {"details": True}}


def engine(stack: Stack, number: int) -> psutil.Process:
    """The process of an engine."""
    (found,) = [
        process
        for process in stack.all_of("engine")
        if any(part.endswith(f"engine-{number}.sock") for part in process.cmdline())
    ]
    return found


def up(stack: Stack) -> list[int]:
    """The engines that get on."""
    return [n for n in NUMBERS if stack.metric(f'tokenwire_replica_up{{engine="{n}"}}') == 1]


def streamed(stack: Stack, seed: int, begun: threading.Semaphore) -> list[int]:
    """The tokens of a stream; the first one releases the semaphore."""
    tokens = []
    with stack.http.stream("POST", "/generate_stream", json=body(seed)) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data:"):
                tokens.append(json.loads(line.removeprefix("data:"))["token"]["id"])
                if len(tokens) == 1:
                    begun.release()
    return tokens


@pytest.fixture(scope="module")
def unbroken(server: Stack) -> list[list[int]]:
    """The tokens of the streams, where nothing happens."""
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        replies = list(
            pool.map(
                lambda seed: server.http.post("/generate", json=body(seed)).raise_for_status(),
                range(NUM_STREAMS),
            )
        )
    return [[token["id"] for token in reply.json()["details"]["tokens"]] for reply in replies]


@contextmanager
def unary_calls(stack: Stack) -> Iterator[list[tuple[int, str]]]:
    """Short calls, one after the other, as long as the block lasts: status and text of each."""
    seen: list[tuple[int, str]] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            reply = stack.http.post("/generate", json=body(99, 4))
            seen.append((reply.status_code, reply.text))

    with ThreadPoolExecutor(2) as pool:
        calling = [pool.submit(call) for _ in range(2)]
        try:
            yield seen
        finally:
            done.set()
        for one in calling:
            one.result()


@contextmanager
def load(stack: Stack, unbroken: list[list[int]]) -> Iterator[list[tuple[int, str]]]:
    """Streams of which each engine has some, and unary calls, while something happens.

    Afterwards all streams must have ended with the tokens that they have without it.
    """
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(NUM_STREAMS) as pool, unary_calls(stack) as seen:
        streams = [pool.submit(streamed, stack, seed, begun) for seed in range(NUM_STREAMS)]
        assert all(begun.acquire(timeout=DEADLINE_S) for _ in range(NUM_STREAMS))
        yield seen
        assert [stream.result() for stream in streams] == unbroken
    assert {status for status, _ in seen} == {200}
    assert len({text for _, text in seen}) == 1


@pytest.mark.parametrize("number", KILLED)
def test_calls_and_streams_of_a_killed_engine_go_on_in_others(
    server: Stack, unbroken: list[list[int]], number: int
) -> None:
    wait_until(lambda: up(server) == [*NUMBERS], "all engines")
    before = server.log()
    restarts = server.metric("tokenwire_engine_restarts_total")
    victim = engine(server, number)
    with load(server, unbroken):
        victim.kill()
    assert server.is_healthy()
    log = server.log().removeprefix(before)
    waiting = re.findall(r"the engine is gone; (\d+) requests wait", log)
    assert [int(count) > 0 for count in waiting] == [True]
    assert f"engine-{number} was killed" in log
    wait_until(lambda: up(server) == [*NUMBERS], "the engine to be back")
    assert server.metric("tokenwire_engine_restarts_total") == restarts + 1
    server.wait_until_idle()


@pytest.mark.parametrize("number", FROZEN)
def test_calls_and_streams_of_a_frozen_engine_go_on_in_others(
    server: Stack, unbroken: list[list[int]], number: int
) -> None:
    wait_until(lambda: up(server) == [*NUMBERS], "all engines")
    frozen = engine(server, number)
    try:
        with load(server, unbroken):
            frozen.suspend()
        wait_until(lambda: number not in up(server), "the frozen engine to be noticed")
        assert frozen.status() == psutil.STATUS_STOPPED, "all have ended without it"
        assert server.is_healthy()
        assert server.metric("tokenwire_engine_up") == 1
    finally:
        frozen.resume()
    wait_until(lambda: up(server) == [*NUMBERS], "the engine to be back")
    server.wait_until_idle()


def test_prompts_that_begin_alike_find_their_beginning_in_the_cache(server: Stack) -> None:
    """In each of three engines in turn it would be found by none of the first three."""
    wait_until(lambda: up(server) == [*NUMBERS], "all engines")
    hits = "tokenwire_prefix_cache_hits_total"
    grown = []
    for number in range(6):
        before = server.metric(hits)
        server.generate(f"{BEGINNING}{number} is a number.", max_new_tokens=1)
        grown.append(server.metric(hits) - before)
    assert grown[0] == 0
    assert all(count >= 64 for count in grown[1:]), grown


def test_the_load_is_that_of_all_engines(server: Stack) -> None:
    server.wait_until_idle()
    with ExitStack() as open_streams:
        for _ in NUMBERS:
            request = {"inputs": PROMPT, "parameters": ENDLESS}
            stream = server.http.stream("POST", "/generate_stream", json=request)
            next(open_streams.enter_context(stream).iter_lines())

        def are_shared() -> bool:
            shown = [server.metric(f'tokenwire_replica_requests{{engine="{n}"}}') for n in NUMBERS]
            return [*shown, server.metric("tgi_batch_current_size")] == [1, 1, 1, 3]

        wait_until(are_shared, "a stream in each engine")
    server.wait_until_idle()


def adapted(stack: Stack, adapter: str) -> list[tuple[int, str]]:
    """Status and text of requests with an adapter, as many as reach each engine in turn."""
    parameters = {"max_new_tokens": 12, "ignore_eos": True, "adapter_id": adapter}
    replies = [
        stack.http.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
        for _ in range(2 * NUM_REPLICAS)
    ]
    return [(reply.status_code, reply.json().get("generated_text", "")) for reply in replies]


def test_adapters_are_those_of_all_engines_also_of_one_that_comes_back(server: Stack) -> None:
    def change(verb: str, **fields: str) -> None:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        reply = server.http.post(f"/v1/{verb}_lora_adapter", json=fields, headers=headers)
        assert reply.status_code == 200, reply.text

    wait_until(lambda: up(server) == [*NUMBERS], "all engines")
    change("load", lora_name="gone", lora_path="0")
    (first,) = set(adapted(server, "gone"))
    engine(server, 1).kill()
    wait_until(lambda: 1 not in up(server), "a dead engine")
    change("unload", lora_name="gone")
    change("load", lora_name="new", lora_path="1")
    wait_until(lambda: up(server) == [*NUMBERS], "the engine to be back")
    (second,) = set(adapted(server, "new"))
    assert (first[0], second[0]) == (200, 200)
    assert first[1] != second[1]
    assert {status for status, _ in adapted(server, "gone")} == {404}
    names = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
    assert names == ["tokenwire/demo", "new"]
    change("unload", lora_name="new")
    assert {status for status, _ in adapted(server, "new")} == {404}
