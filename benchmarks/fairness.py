"""What one caller's many huge prompts cost another caller.

Starts a server with the bundled model. A modest caller streams short answers, one after the other,
first alone and then while a greedy caller, from another process, keeps a number of prompts of the
longest length under way. The figure is the modest caller's time to the first token.

    .venv/bin/python -m benchmarks.fairness

The last line is one JSON document. Times are in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import random
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

from benchmarks import machine
from benchmarks.local_server import server
from benchmarks.report import Target, last_line, percentile, table, targets_table
from service.bundled import demo_model

OVERLOADED = 429
GOAL = 2.0  # times the first token's p99 that a caller has alone
TIMEOUT_S = 120.0
MODEST, GREEDY = (
    {"content-type": "application/json", "x-tenant": name} for name in ("modest", "greedy")
)


@dataclass(frozen=True, slots=True)
class Greed:
    """The greedy caller: requests at a time, tokens of each, and how nice its process is."""

    num_requests: int
    num_tokens: int
    niceness: int = 19


def question(number: int) -> bytes:
    """A short prompt, another one each time."""
    inputs = f"What is {number} and {number + 1}?"
    return json.dumps({"inputs": inputs, "parameters": {"max_new_tokens": 4}}).encode()


def huge(thread: int, number: int, num_tokens: int) -> bytes:
    """A prompt of so many tokens, which no other begins like."""
    numbers = random.Random(f"{thread} {number}").choices(range(10), k=num_tokens)
    inputs = " ".join(map(str, numbers))
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 1, "truncate": num_tokens}}
    return json.dumps(body).encode()


def first_token_ms(connection: http.client.HTTPConnection, body: bytes) -> float:
    """Milliseconds until a stream's first event.

    Raises:
        RuntimeError: it is no stream.
    """
    started = time.perf_counter()
    connection.request("POST", "/generate_stream", body, MODEST)
    reply = connection.getresponse()
    line = reply.readline()
    elapsed = 1000 * (time.perf_counter() - started)
    if not line.startswith(b'data:{"index"') and b'"token"' not in line:
        raise RuntimeError(f"{reply.status}: {line!r}")
    reply.read()
    return elapsed


def ask(host: str, seconds: float) -> list[float]:
    """The modest caller: first tokens, one stream after the other."""
    connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
    until = time.perf_counter() + seconds
    found: list[float] = []
    while time.perf_counter() < until:
        found.append(first_token_ms(connection, question(len(found))))
    connection.close()
    return found


def send(host: str, greed: Greed, over: Event, answers: Any) -> None:
    """The greedy caller, in a process of its own.

    `answers` is a queue that gets None when all requests are under way, and the statuses at last.
    """
    statuses: Counter[str] = Counter()

    def caller(thread: int) -> None:
        connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
        number = 0
        while not over.is_set():
            connection.request("POST", "/generate", huge(thread, number, greed.num_tokens), GREEDY)
            reply = connection.getresponse()
            reply.read()
            statuses[str(reply.status)] += 1
            number += 1
            if reply.status == OVERLOADED:
                over.wait(float(reply.headers["retry-after"]))

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(greed.num_requests)]
    os.nice(greed.niceness)  # it computes elsewhere
    for thread in threads:
        thread.start()
    answers.put(None)
    for thread in threads:
        thread.join()
    answers.put(dict(statuses))


def beside_greed(host: str, greed: Greed, seconds: float) -> tuple[list[float], dict[str, int]]:
    """The modest caller's times beside the greedy one's requests, and how those were answered."""
    context = multiprocessing.get_context("spawn")
    over, answers = context.Event(), context.Queue()
    process = context.Process(target=send, args=(host, greed, over, answers))
    process.start()
    try:
        answers.get(timeout=TIMEOUT_S)
        found = ask(host, seconds)
    finally:
        over.set()
    statuses = answers.get(timeout=2 * TIMEOUT_S)
    process.join()
    return found, statuses


async def measure(greed: Greed, seconds: float) -> tuple[list[float], list[float], dict[str, int]]:
    """First tokens alone and beside the greedy caller, and the answers of the latter."""
    async with server(demo_model()) as (url, _):
        host = urlsplit(url).netloc
        await asyncio.to_thread(ask, host, min(seconds, 2.0))  # warms up
        alone = await asyncio.to_thread(ask, host, seconds)
        beside, statuses = await asyncio.to_thread(beside_greed, host, greed, seconds)
    return alone, beside, statuses


def row(name: str, found: list[float]) -> list[str]:
    """As a row of the table."""
    times = (statistics.median(found), percentile(found, 99), max(found))
    return [name, str(len(found)), *(f"{number:.0f}" for number in times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=128, help="of the greedy caller at a time")
    parser.add_argument("--tokens", type=int, default=1000, help="of each of its prompts")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each part")
    parser.add_argument("--tiny", action="store_true", help="a test of this script")
    arguments = parser.parse_args()
    greed, seconds = Greed(arguments.requests, arguments.tokens), arguments.seconds
    if arguments.tiny:
        greed, seconds = Greed(4, 50, niceness=0), 0.5
    described = machine.describe()
    alone, beside, statuses = asyncio.run(measure(greed, seconds))
    print(machine.line(described))
    header = ["modest caller", "streams", "first token p50, ms", "p99", "max"]
    print(table(header, [row("alone", alone), row("beside the greedy one", beside)]))
    print("the greedy one's answers:", *(f"{n} x {status}" for status, n in statuses.items()))
    ratio = percentile(beside, 99) / percentile(alone, 99)
    goals = [Target("first token's p99, times alone", ratio, GOAL, at_least=False)]
    print(targets_table(goals))
    document = {"machine": described, "alone_ms": alone, "beside_ms": beside, "greedy": statuses}
    print(last_line(document, goals))


if __name__ == "__main__":
    main()
