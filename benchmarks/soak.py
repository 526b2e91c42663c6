"""Whether a server stays right and the same under everything at once, killed again and again.

Starts a server with the bundled model. Eight kinds of callers use it at the same time: short and
long answers, callers that leave, callers that do not read, huge requests, invalid ones, grammars
and tools. One more asks for single tokens: the probe. Every so often the engine, the service or
Envoy is killed, in turn. Every answer is compared with the right one, which the idle server gave.

    .venv/bin/python -m benchmarks.soak --minutes 20

The last line is one JSON document. Times are in milliseconds, memory in MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks import machine
from benchmarks.held import Held
from benchmarks.local_server import http_client, server
from benchmarks.processes import role_of
from benchmarks.report import last_line, percentile, table
from service.bundled import demo_model

PROMPTS = [f"What is {thing}?" for thing in ("Deep Learning", "a cat", "the sea", "a number")]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ROLES = ("engine", "service", "envoy")
AFTERMATH_S = 5.0  # after the recovery of a process, for answers that it had begun


class WrongError(Exception):
    """An answer is complete, and not the right one."""


class CutError(Exception):
    """A stream has ended without its end, or with an error."""


@dataclass(slots=True)
class Tally:
    """What became of the requests of one kind of caller."""

    right: int = 0
    excused: int = 0
    wrong: int = 0
    lost: int = 0
    why: Counter[str] = field(default_factory=Counter)

    def fail(self, error: Exception, *, excused: bool) -> None:
        """Counts a request without an answer; `excused` says that it may fail just now."""
        if excused:
            self.excused += 1
        else:
            self.lost += 1
            self.why[f"{type(error).__name__}: {error}"[:300]] += 1


class Disturbances:
    """The kills so far, and whether what fails now may be their fault."""

    def __init__(self) -> None:
        self._until = 0.0
        self._is_down = False
        self.recoveries: defaultdict[str, list[float]] = defaultdict(list)

    def begin(self) -> None:
        """A process is about to be killed."""
        self._is_down = True

    def end(self, role: str, seconds: float) -> None:
        """Requests are answered again."""
        self.recoveries[role].append(seconds)
        self._is_down = False
        self._until = time.monotonic() + AFTERMATH_S

    def excuse(self, began: float) -> bool:
        """Whether a request that began then may have failed by a kill."""
        return self._is_down or began < self._until


class Soak:
    """One run.

    Args:
        client: of the server.
        supervisor: the process whose children are killed.
    """

    def __init__(self, client: httpx.AsyncClient, supervisor: psutil.Process) -> None:
        self._client = client
        self._supervisor = supervisor
        self._random = random.Random(1)
        self._expected: dict[str, str] = {}
        self.disturbances = Disturbances()
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self.probe_ms: list[float] = []

    async def learn(self) -> None:
        """Asks the idle server for the right answers."""
        for prompt in PROMPTS:
            self._expected[f"short {prompt}"] = await self._text(_short(prompt))
            self._expected[f"long {prompt}"] = await self._text(_long(prompt))

    async def run(self, seconds: float, kill_every_s: float) -> None:
        """Lets all callers work, and kills processes meanwhile."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "short": self._ask_short,
            "long": self._read_long,
            "aborting": self._leave,
            "stalled": self._do_not_read,
            "huge": self._ask_huge,
            "invalid": self._ask_invalid,
            "grammar": self._ask_grammar,
            "tools": self._ask_tools,
        }
        tasks = [
            asyncio.create_task(self._repeat(kind, ask))
            for kind, ask in kinds.items()
            for _ in range(2)
        ]
        tasks.append(asyncio.create_task(self._probe()))
        await self._kill_in_turn(seconds, kill_every_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def processes(self) -> dict[str, psutil.Process]:
        """The server's processes by what they are."""
        found = {"supervisor": self._supervisor}
        for child in self._supervisor.children():
            with suppress(psutil.Error):
                found[role_of(child)] = child
        return found

    async def _repeat(self, kind: str, ask: Callable[[], Awaitable[None]]) -> None:
        tally = self.tallies[kind]
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(60):
                    await ask()
                tally.right += 1
            except WrongError as error:
                tally.wrong += 1
                tally.why[f"wrong: {error}"[:300]] += 1
            except (CutError, httpx.HTTPError, TimeoutError) as error:
                tally.fail(error, excused=self.disturbances.excuse(began) or _is_refusal(error))
                await asyncio.sleep(0.1)

    async def _probe(self) -> None:
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
        tally = self.tallies["probe"]
        while True:
            began = time.monotonic()
            try:
                (await self._client.post("/generate", json=body, timeout=60)).raise_for_status()
                self.probe_ms.append(1000 * (time.monotonic() - began))
                tally.right += 1
            except httpx.HTTPError as error:
                tally.fail(error, excused=self.disturbances.excuse(began) or _is_refusal(error))
            await asyncio.sleep(0.05)

    async def _kill_in_turn(self, seconds: float, kill_every_s: float) -> None:
        end = time.monotonic() + seconds
        number = 0
        while time.monotonic() + kill_every_s < end:
            await asyncio.sleep(kill_every_s)
            role = ROLES[number % len(ROLES)]
            number += 1
            self.disturbances.begin()
            began = time.monotonic()
            self.processes()[role].send_signal(signal.SIGKILL)
            await asyncio.sleep(0.1)
            await self._recovered()
            self.disturbances.end(role, time.monotonic() - began)
        await asyncio.sleep(max(end - time.monotonic(), 0))

    async def _recovered(self) -> None:
        """Returns once a new request is answered."""
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
        while True:
            with suppress(httpx.HTTPError):
                reply = await self._client.post("/generate", json=body, timeout=30)
                if reply.status_code == 200:
                    return
            await asyncio.sleep(0.1)

    async def _text(self, body: dict[str, Any]) -> str:
        reply = await self._client.post("/generate", json=body)
        reply.raise_for_status()
        return str(reply.json()["generated_text"])

    async def _ask_short(self) -> None:
        prompt = self._random.choice(PROMPTS)
        _check(self._expected[f"short {prompt}"], await self._text(_short(prompt)))

    async def _read_long(self) -> None:
        prompt = self._random.choice(PROMPTS)
        last: dict[str, Any] = {}
        async with aclosing(self._events(_long(prompt))) as events:
            async for event in events:
                last = event
        if "error" in last or last.get("generated_text") is None:
            raise CutError(str(last.get("error", "no end")))
        _check(self._expected[f"long {prompt}"], last["generated_text"])

    async def _leave(self) -> None:
        async with aclosing(self._events(_long(PROMPTS[0]))) as events:
            for _ in range(self._random.randint(1, 5)):
                await anext(events, None)

    async def _do_not_read(self) -> None:
        body = {**_long(PROMPTS[1])}
        async with self._client.stream("POST", "/generate_stream", json=body) as reply:
            reply.raise_for_status()
            await asyncio.sleep(3)

    async def _ask_huge(self) -> None:
        if self._random.random() < 0.5:
            reply = await self._client.post("/tokenize", json={"inputs": "word " * 60_000})
        else:
            turns = [{"role": "user", "content": "a"}] * 20_000
            reply = await self._client.post("/v1/chat/completions", json={"messages": turns})
            if reply.status_code == 200:
                raise WrongError("20,000 messages were accepted")
        if reply.status_code != 422:
            reply.raise_for_status()

    async def _ask_invalid(self) -> None:
        bodies = {b"{": 400, b'{"inputs": 1}': 422, b'{"inputs": ""}': 422, b'["a"]': 422}
        body, status = self._random.choice(list(bodies.items()))
        headers = {"content-type": "application/json"}
        reply = await self._client.post("/generate", content=body, headers=headers)
        if reply.status_code != status:
            reply.raise_for_status()
            raise WrongError(f"{reply.status_code} for {body!r}")
        await asyncio.sleep(0.02)

    async def _ask_grammar(self) -> None:
        grammar = {"type": "json", "value": SCHEMA}
        parameters = {"grammar": grammar, "max_new_tokens": 60, "details": True}
        body = {"inputs": self._random.choice(PROMPTS), "parameters": parameters}
        reply = await self._client.post("/generate", json=body)
        reply.raise_for_status()
        result = reply.json()
        if result["details"]["finish_reason"] == "length":
            return
        made = json.loads(result["generated_text"])
        if list(made) != ["name", "n"] or not isinstance(made["n"], int):
            raise WrongError(f"not an instance: {made}")

    async def _ask_tools(self) -> None:
        body = {
            "messages": [{"role": "user", "content": "How is the weather in Rome?"}],
            "tools": [TOOL],
            "tool_choice": "required",
            "max_tokens": 80,
        }
        reply = await self._client.post("/v1/chat/completions", json=body)
        reply.raise_for_status()
        (choice,) = reply.json()["choices"]
        if choice["finish_reason"] != "length" and not choice["message"].get("tool_calls"):
            raise WrongError(f"no call: {choice}")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self._client.stream("POST", "/generate_stream", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))


async def used_blocks(client: httpx.AsyncClient) -> int:
    """Blocks of the KV cache that somebody holds, once nothing runs any more."""
    series = 'tokenwire_kv_blocks{state="used"}'
    used = -1
    for _ in range(100):
        with suppress(httpx.HTTPError):
            lines = (await client.get("/metrics", timeout=10)).text.splitlines()
            used = next(
                (int(float(x.rpartition(" ")[2])) for x in lines if x.startswith(series)), -1
            )
        if used == 0:
            break
        await asyncio.sleep(0.2)
    return used


def _short(prompt: str) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": 8}}


def _long(prompt: str) -> dict[str, Any]:
    sampling = {"do_sample": True, "seed": 7, "temperature": 1.5, "ignore_eos": True}
    return {"inputs": prompt, "parameters": {"max_new_tokens": 150, **sampling}}


def _check(expected: str, found: str) -> None:
    if found != expected:
        raise WrongError(f"{found!r} instead of {expected!r}")


def _is_refusal(error: Exception) -> bool:
    """Whether the server said that it has no room now."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 429


@asynccontextmanager
async def running() -> AsyncIterator[tuple[httpx.AsyncClient, psutil.Process]]:
    """A server's client, and its supervisor."""
    async with server(demo_model()) as (url, _), http_client(url) as client:
        client.timeout = httpx.Timeout(60)
        (supervisor,) = psutil.Process().children()
        yield client, supervisor


async def main(minutes: float, kill_every_s: float) -> None:
    """Runs all and prints the tables."""
    async with running() as (client, supervisor):
        soak = Soak(client, supervisor)
        await soak.learn()
        before = {role: Held.by(process) for role, process in soak.processes().items()}
        await soak.run(60 * minutes, kill_every_s)
        blocks = await used_blocks(client)
        after = {role: Held.by(process) for role, process in soak.processes().items()}
    report(soak, minutes, blocks, before, after)


def report(
    soak: Soak, minutes: float, blocks: int, before: dict[str, Held], after: dict[str, Held]
) -> None:
    """Prints what was seen."""
    described = machine.describe()
    print(machine.line(described))
    rows = [
        [kind, *(f"{n:,}" for n in (t.right, t.excused, t.wrong, t.lost))]
        for kind, t in soak.tallies.items()
    ]
    print(table(["callers", "right", "excused", "wrong", "lost"], rows))
    for kind, tally in soak.tallies.items():
        for why, count in tally.why.items():
            print(f"{kind}: {count} x {why}")
    held = [
        [role, *(f"{n:.0f}" for n in (was.rss, after[role].rss, was.files, after[role].files))]
        for role, was in before.items()
        if role in after
    ]
    print(table(["process", "MiB before", "after", "files before", "after"], held))
    times = soak.disturbances.recoveries
    recoveries = [
        [role, str(len(found)), f"{percentile(found, 50):.1f}", f"{max(found):.1f}"]
        for role, found in times.items()
    ]
    print(table(["killed", "times", "back after, s, p50", "max"], recoveries))
    p50, p99 = (percentile(soak.probe_ms, share) for share in (50, 99))
    print(f"{minutes:g} min; probe p50 {p50:.0f} ms, p99 {p99:.0f} ms; {blocks} blocks held")
    print(
        last_line(
            {
                "machine": described,
                "minutes": minutes,
                "tallies": {kind: asdict(tally) for kind, tally in soak.tallies.items()},
                "probe_ms": {"p50": p50, "p99": p99},
                "recovery_s": dict(times),
                "blocks": blocks,
                "before": {role: asdict(item) for role, item in before.items()},
                "after": {role: asdict(item) for role, item in after.items()},
            },
            [],
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds")
    parser.add_argument("--tiny", action="store_true", help="half a minute, a kill every 6 seconds")
    options = parser.parse_args()
    if options.tiny:
        options.minutes, options.kill_every = 0.5, 6.0
    asyncio.run(main(options.minutes, options.kill_every))
