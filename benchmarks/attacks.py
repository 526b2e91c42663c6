"""What a few costly requests do to everybody else.

Starts a server with the bundled model and sends each attack of `attack_bodies` over and over for
some seconds, from another process. Meanwhile one caller generates single tokens, one asks for
/health and one for grpc.health.v1, and the service's memory is watched. All with an idle server
first.

    .venv/bin/python -m benchmarks.attacks

The last line is one JSON document. Times are in milliseconds, memory in MiB: of the service and
its processes for grammars and long texts, without engine and Envoy.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import machine
from benchmarks.attack_bodies import ATTACKS, FULL_BYTES, Attack
from benchmarks.local_server import server
from benchmarks.report import Target, last_line, percentile, table, targets_table
from service.bundled import demo_model

PAUSE_S = 0.02  # between two probes
SETTLE_S = 3.0  # after an attack, before memory is looked at
TIMEOUT_S = 120.0
_NICENESS = 19
HEADERS = {"content-type": "application/json"}
PROBE = json.dumps({"inputs": "hello", "parameters": {"max_new_tokens": 1}}).encode()


@dataclass(slots=True)
class Seen:
    """What was seen in some seconds; times in milliseconds, memory in MiB."""

    probe_ms: list[float] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)
    grpc_health_ms: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Row:
    """An attack and what it did."""

    attack: str
    statuses: dict[str, int]
    slowest_ms: float
    probe_p50_ms: float
    probe_p99_ms: float
    health_ms: float
    grpc_health_ms: float
    before_mib: float
    peak_mib: float
    after_mib: float
    failures: dict[str, int]

    def cells(self) -> list[str]:
        """As a row of the table."""
        statuses = " ".join(f"{count} x {status}" for status, count in self.statuses.items())
        failed = " ".join(f"{count} x {what}" for what, count in self.failures.items()) or "-"
        times = (self.slowest_ms, self.probe_p50_ms, self.probe_p99_ms)
        healths = (self.health_ms, self.grpc_health_ms)
        memory = (self.before_mib, self.peak_mib, self.after_mib)
        numbers = [f"{number:.0f}" for number in (*times, *healths, *memory)]
        return [self.attack, statuses or "-", *numbers, failed]


HEADER = [
    *("attack", "answers", "slowest", "probe p50", "p99", "/health", "grpc health"),
    *("MiB before", "peak", "after", "others failed"),
]


class Watched:
    """A running server, and those who use it while it is attacked."""

    def __init__(self, url: str, grpc_address: str, service: psutil.Process) -> None:
        self.host = urlsplit(url).netloc
        self._grpc_address = grpc_address
        self._service = service

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """Probes for the length of a block."""
        seen, over = Seen(), threading.Event()
        loops = (self._probe, self._health, self._grpc_health, self._memory)
        threads = [threading.Thread(target=loop, args=(seen, over)) for loop in loops]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def memory_mib(self) -> float:
        """Of the service and its processes."""
        total = 0
        for process in (self._service, *self._service.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total / 2**20

    def _probe(self, seen: Seen, over: threading.Event) -> None:
        self._ask(seen, over, seen.probe_ms, "POST", "/generate", PROBE)

    def _health(self, seen: Seen, over: threading.Event) -> None:
        self._ask(seen, over, seen.health_ms, "GET", "/health", None)

    def _ask(
        self,
        seen: Seen,
        over: threading.Event,
        times: list[float],
        method: str,
        path: str,
        body: bytes | None,
    ) -> None:
        connection = http.client.HTTPConnection(self.host, timeout=TIMEOUT_S)
        while not over.is_set():
            status, seconds = exchange(connection, method, path, body)
            times.append(1000 * seconds)
            if status != "200":
                seen.failures[f"{path} {status}"] += 1
            time.sleep(PAUSE_S)

    def _grpc_health(self, seen: Seen, over: threading.Event) -> None:
        with grpc.insecure_channel(self._grpc_address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            while not over.is_set():
                started = time.perf_counter()
                try:
                    check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
                except grpc.RpcError as error:
                    seen.failures[f"health {error.code().name}"] += 1
                seen.grpc_health_ms.append(1000 * (time.perf_counter() - started))
                time.sleep(PAUSE_S)

    def _memory(self, seen: Seen, over: threading.Event) -> None:
        while not over.is_set():
            seen.memory_mib.append(self.memory_mib())
            time.sleep(PAUSE_S)


def exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
) -> tuple[str, float]:
    """Status and seconds of a request; the status is the failure's name if there is none."""
    started = time.perf_counter()
    try:
        connection.request(method, path, body, HEADERS if body is not None else {})
        reply = connection.getresponse()
        while reply.read(1 << 20):
            pass
        status = str(reply.status)
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        status = type(error).__name__
    return status, time.perf_counter() - started


def send(host: str, name: str, size: int, over: Event, answers: Any) -> None:
    """An attacker, in a process of its own: sends the request until it is over, in some threads.

    `answers` is a queue that gets None at the start, and in the end pairs of status and
    milliseconds.
    """
    attack = next(item for item in ATTACKS if item.name == name)
    body = attack.make(size)
    found: list[tuple[str, float]] = []

    def attacker() -> None:
        connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
        while True:
            status, seconds = exchange(connection, "POST", attack.path, body)
            found.append((status, 1000 * seconds))
            if over.is_set():
                return

    os.nice(_NICENESS)  # attackers compute elsewhere
    answers.put(None)
    threads = [threading.Thread(target=attacker) for _ in range(attack.count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.put(found)


def idle(watched: Watched, seconds: float) -> Row:
    """Nobody else."""
    before = watched.memory_mib()
    with watched.watching() as seen:
        time.sleep(seconds)
    return _row("none", [], seen, before, watched.memory_mib())


def attacked(watched: Watched, attack: Attack, size: int, seconds: float) -> Row:
    """One attack."""
    context = multiprocessing.get_context("spawn")
    over, answers = context.Event(), context.Queue()
    before = watched.memory_mib()
    process = context.Process(target=send, args=(watched.host, attack.name, size, over, answers))
    process.start()
    answers.get(timeout=TIMEOUT_S)
    with watched.watching() as seen:
        time.sleep(seconds)
        over.set()
        found = answers.get(timeout=2 * TIMEOUT_S)
    process.join()
    time.sleep(SETTLE_S)
    return _row(attack.name, found, seen, before, watched.memory_mib())


def _row(name: str, found: list[tuple[str, float]], seen: Seen, before: float, after: float) -> Row:
    return Row(
        attack=name,
        statuses=dict(Counter(status for status, _ in found)),
        slowest_ms=max((milliseconds for _, milliseconds in found), default=0.0),
        probe_p50_ms=statistics.median(seen.probe_ms),
        probe_p99_ms=percentile(seen.probe_ms, 99),
        health_ms=max(seen.health_ms),
        grpc_health_ms=max(seen.grpc_health_ms),
        before_mib=before,
        peak_mib=max(seen.memory_mib),
        after_mib=after,
        failures=dict(seen.failures),
    )


def targets(rows: Sequence[Row]) -> list[Target]:
    """The worst of all attacks; the first row is the idle server."""
    quiet, *attacks = rows
    return [
        Target(
            "probe's p99, times the idle one",
            max(row.probe_p99_ms for row in attacks) / quiet.probe_p99_ms,
            3.0,
            at_least=False,
        ),
        Target(
            "/health, times 100 ms",
            max(max(row.health_ms, row.grpc_health_ms) for row in attacks) / 100,
            1.0,
            at_least=False,
        ),
        Target(
            "memory after, times before",
            max(row.after_mib / row.before_mib for row in attacks),
            1.1,
            at_least=False,
        ),
    ]


def find_service(url: str) -> psutil.Process:
    """The service process of the server that this process has started."""
    for process in psutil.Process().children(recursive=True):
        arguments = process.cmdline()
        if "service.cli" in arguments and "service" in arguments:
            return process
    raise RuntimeError(f"no service process behind {url}")


async def measure(arguments: argparse.Namespace) -> list[Row]:
    """Idle first, then every attack."""
    async with server(demo_model()) as (url, grpc_address):
        watched = Watched(url, grpc_address, find_service(url))
        for _ in range(2):  # the first time warms everything up
            rows = [await asyncio.to_thread(idle, watched, arguments.seconds)]
        for attack in ATTACKS:
            if not arguments.only or arguments.only in attack.name:
                size, seconds = arguments.bytes, arguments.seconds
                rows.append(await asyncio.to_thread(attacked, watched, attack, size, seconds))
                print(rows[-1].attack, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each attack goes on")
    parser.add_argument("--bytes", type=int, default=FULL_BYTES, help="of a request")
    parser.add_argument("--only", default="", help="a part of an attack's name")
    parser.add_argument("--tiny", action="store_true", help="a test of this script")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.bytes, arguments.seconds, arguments.only = 20_000, 0.2, "tools"
    described = machine.describe()
    rows = asyncio.run(measure(arguments))
    print(machine.line(described))
    print(table(HEADER, [row.cells() for row in rows]))
    goals = targets(rows)
    print(targets_table(goals))
    print(last_line({"machine": described, "rows": [asdict(row) for row in rows]}, goals))


if __name__ == "__main__":
    main()
