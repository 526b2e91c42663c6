"""Whether a server grows: what its processes hold in an hour of requests of mixed lengths.

Starts a server with the bundled model and its Envoy. A few callers ask one thing after the other,
at random: answers and streams of any length over REST and gRPC, chats, texts to tokenise, grammars
that nobody has asked for before, and streams that they leave. Nothing is killed; `soak` does that.

    .venv/bin/python -m benchmarks.growth --minutes 60

The last line is one JSON document, with what every process held every minute. Memory is in MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import httpx
import psutil

from benchmarks import held, machine
from benchmarks.held import Held
from benchmarks.local_server import METHOD, http_client, server
from benchmarks.report import Target, last_line, table, targets_table
from benchmarks.soak import used_blocks
from service.bundled import demo_model
from service.pb.tokenwire.v1 import GenerateParameters, GenerateRequest

_WORDS = (
    "sea",
    "number",
    "cats",
    "learn",
    "deep",
    "water",
    "means",
    "people",
    "Rome",
    "what",
    "is",
)
KINDS = ("answer", "stream", "gRPC stream", "chat", "tokenize", "grammar", "left")
_ROWS = 8  # of the table
_GROWTH = 1.02  # last quarter by second: caches are full after the first


@dataclass(frozen=True, slots=True)
class Sample:
    """What the processes held at a time, in seconds since the first request."""

    at: float
    held: dict[str, Held]


class Callers:
    """Those who ask at random.

    Args:
        client: of REST.
        channel: of gRPC.
        room: tokens that a prompt and its answer may have together.
        share: of the time that a caller waits for answers; otherwise it rests.
        kinds: what they ask for.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        channel: grpc.aio.Channel,
        room: int,
        share: float,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        self._client, self._channel, self._share, self._kinds = client, channel, share, kinds
        self._longest_prompt, self._longest_answer = room // 2, min(room // 2, 400)
        self._random = random.Random(1)
        self._names = itertools.count()
        self.asked: Counter[str] = Counter()

    async def ask_on(self) -> None:
        """One caller, until it is cancelled.

        Raises:
            httpx.HTTPError, grpc.aio.AioRpcError: something was not answered.
        """
        ask: dict[str, Callable[[], Awaitable[None]]] = {
            "answer": self._answer,
            "stream": self._stream,
            "gRPC stream": self._grpc_stream,
            "chat": self._chat,
            "tokenize": self._tokenize,
            "grammar": self._grammar,
            "left": self._leave,
        }
        while True:
            kind = self._random.choice(self._kinds)
            began = time.monotonic()
            await ask[kind]()
            self.asked[kind] += 1
            await asyncio.sleep((time.monotonic() - began) * (1 / self._share - 1))

    async def _answer(self) -> None:
        await self._post("/generate", self._body())

    async def _stream(self) -> None:
        async with self._client.stream("POST", "/generate_stream", json=self._body()) as reply:
            reply.raise_for_status()
            async for _ in reply.aiter_lines():
                pass

    async def _leave(self) -> None:
        async with self._client.stream("POST", "/generate_stream", json=self._body()) as reply:
            reply.raise_for_status()
            async with aclosing(reply.aiter_lines()) as lines:
                for _ in range(self._random.randint(1, 20)):
                    await anext(lines, None)

    async def _grpc_stream(self) -> None:
        body = self._body()
        request = GenerateRequest(
            inputs=body["inputs"], parameters=GenerateParameters(**body["parameters"])
        )
        async for _ in self._channel.unary_stream(METHOD, None, None)(bytes(request)):
            pass

    async def _chat(self) -> None:
        turns = [
            {"role": role, "content": self._text(self._length(self._longest_prompt // 8))}
            for role in ("system", *("user", "assistant") * self._random.randint(0, 2), "user")
        ]
        body = {"messages": turns, "max_tokens": self._length(self._longest_answer)}
        await self._post("/v1/chat/completions", body)

    async def _tokenize(self) -> None:
        await self._post("/tokenize", {"inputs": self._text(self._length(20_000))})

    async def _grammar(self) -> None:
        name = f"field{next(self._names)}"
        schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
        grammar = {"type": "json", "value": schema}
        parameters = {"grammar": grammar, "max_new_tokens": 40}
        await self._post("/generate", {"inputs": self._text(8), "parameters": parameters})

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        reply = await self._client.post(path, json=body)
        if reply.status_code != 422 or path != "/tokenize":  # a text may be too long for that
            reply.raise_for_status()

    def _body(self) -> dict[str, Any]:
        """A request of any length, greedy or sampled."""
        sampling = {"do_sample": True, "temperature": 1.2, "seed": self._random.randrange(1000)}
        parameters = {
            "max_new_tokens": self._length(self._longest_answer),
            "truncate": self._longest_prompt,
            **(sampling if self._random.random() < 0.5 else {}),
        }
        return {"inputs": self._text(self._length(self._longest_prompt)), "parameters": parameters}

    def _length(self, longest: int) -> int:
        """Between 1 and the longest; short ones are as frequent as long ones."""
        return round(math.exp(self._random.uniform(0, math.log(longest))))

    def _text(self, num_words: int) -> str:
        return " ".join(self._random.choices(_WORDS, k=num_words))


async def watch(supervisor: psutil.Process, seconds: float, every_s: float) -> list[Sample]:
    """Samples at the start, then again and again, and at the end."""
    began, samples = time.monotonic(), list[Sample]()
    while True:
        at = time.monotonic() - began
        samples.append(Sample(at, held.by_role(supervisor)))
        rss = {role: round(item.rss) for role, item in samples[-1].held.items()}
        print(f"{at / 60:.1f} min: {rss}", file=sys.stderr, flush=True)
        if at >= seconds:
            return samples
        await asyncio.sleep(min(every_s, max(seconds - at, 0.1)))


def growth(samples: list[Sample], role: str) -> float:
    """Memory of a process in the last quarter of the time, by that in the second quarter."""
    rss = [sample.held[role].rss for sample in samples if role in sample.held]
    quarter = max(len(rss) // 4, 1)
    before, after = rss[quarter : 2 * quarter] or rss[:1], rss[-quarter:]
    return statistics.mean(after) / statistics.mean(before)


def report(samples: list[Sample], asked: Counter[str], blocks: int) -> str:
    """What was held over time, and at the beginning and the end."""
    roles = list(samples[0].held)
    step = max((len(samples) - 1) / _ROWS, 1)
    chosen = [samples[round(step * at)] for at in range(_ROWS) if step * at < len(samples) - 1]
    rows = [
        [f"{sample.at / 60:.0f}", *(f"{sample.held[role].rss:.0f}" for role in roles)]
        for sample in [*chosen, samples[-1]]
    ]
    first, last = samples[0].held, samples[-1].held
    counts = [
        [
            role,
            f"{growth(samples, role):.3f}",
            *(f"{item.private:.0f}" for item in (first[role], last[role])),
            *(str(item.files) for item in (first[role], last[role])),
            *(str(item.threads) for item in (first[role], last[role])),
        ]
        for role in roles
    ]
    header = ["", "last quarter by second", "private before", "after"]
    header += ["files before", "after", "threads before", "after"]
    lines = [
        table(["minute, RSS in MiB", *roles], rows),
        table(header, counts),
        f"{sum(asked.values())} requests: {dict(asked)}; {blocks} blocks held at the end",
        targets_table(targets(samples)),
    ]
    return "\n\n".join(lines)


def targets(samples: list[Sample]) -> list[Target]:
    """No process grows."""
    return [
        Target(f"{role}, last quarter by second", growth(samples, role), _GROWTH, at_least=False)
        for role in samples[0].held
    ]


async def measure(arguments: argparse.Namespace) -> tuple[list[Sample], Counter[str], int]:
    """The samples, what was asked, and the blocks of the KV cache that were held at the end."""
    async with (
        server(demo_model()) as (url, address),
        http_client(url) as client,
        grpc.aio.insecure_channel(address) as channel,
    ):
        (supervisor,) = psutil.Process().children()
        room = (await client.get("/info")).json()["max_total_tokens"]
        callers = Callers(client, channel, room, arguments.share, arguments.kinds)
        tasks = [asyncio.create_task(callers.ask_on()) for _ in range(arguments.callers)]
        watching = asyncio.create_task(watch(supervisor, 60 * arguments.minutes, arguments.every))
        await asyncio.wait([*tasks, watching], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()  # what went wrong is raised
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return await watching, callers.asked, await used_blocks(client)


def main() -> None:
    """Watches and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=60.0)
    add("--every", type=float, default=60.0, help="seconds between samples")
    add("--callers", type=int, default=2)
    add("--share", type=float, default=1.0, help="of the time that a caller does not rest")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="to see which one grows")
    add("--tiny", action="store_true", help="some seconds")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.minutes, arguments.every = 0.08, 1.0
    described = machine.describe()
    samples, asked, blocks = asyncio.run(measure(arguments))
    print(f"\n{machine.line(described)}\n\n{report(samples, asked, blocks)}\n")
    result = {
        "machine": described,
        "samples": [asdict(sample) for sample in samples],
        "asked": dict(asked),
        "blocks": blocks,
    }
    print(last_line(result, targets(samples)))


if __name__ == "__main__":
    main()
