"""How long the service's event loop stands still, by what is asked of it, and where.

All streams of a service wait that long. Supervisor, service and Envoy are those of `tokenwire
serve`; the engine has no model, and a context of 131,072 tokens. Beside a few streams each of the
largest requests that the limits allow is sent some times, one after the other, over REST or gRPC.
`watched_service` tells how long the loop stood still meanwhile, and what threads did.

    .venv/bin/python -m benchmarks.loop

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc import aio

from benchmarks import machine
from benchmarks.local_server import METHOD, free_port, http_client, process
from benchmarks.report import Target, last_line, table, targets_table
from benchmarks.workers import Arrived, running
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE

_GOAL_MS = 5.0
_CONTEXT = 131_072
_STEP_S = 0.02
_NUM_STREAMS = 8
_AFTER_S = 1.2  # until memory of large requests is given back, which counts as well
_MIB = 1 << 20

Send = Callable[["Clients"], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Clients:
    """Ways to the server."""

    rest: httpx.AsyncClient
    channel: aio.Channel

    async def post(self, path: str, body: dict[str, Any]) -> None:
        """A REST request, whatever its status is."""
        raw = json.dumps(body, ensure_ascii=False).encode()
        headers = {"content-type": "application/json"}
        await self.rest.post(path, content=raw, headers=headers)

    async def call(self, method: str, request: Any) -> None:
        """A unary gRPC call, whatever its status is."""
        try:
            await self.channel.unary_unary(f"/{SERVICE}/{method}")(bytes(request))
        except grpc.RpcError as error:
            print(method, error.code(), str(error.details())[:100], file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Row:
    """What was seen of a kind of request.

    Attributes:
        kind: of requests.
        seconds: that one took.
        longest_ms: that the loop stood still.
        num_blocks: of more than the goal.
        where: what threads did in the longest.
    """

    kind: str
    seconds: float
    longest_ms: float
    num_blocks: int
    where: str


def _words(num_bytes: int) -> str:
    return "How do rivers find their way to the sea? " * (num_bytes // 41)


def _chat(count: int, num_bytes: int, **more: Any) -> dict[str, Any]:
    turn = _words(num_bytes // count - 40) or "hi"
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": turn} for at in range(count)]
    return {"messages": messages, "max_tokens": 2, **more}


def _tools(count: int) -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in "abcdef"}}
    return [
        {
            "type": "function",
            "function": {"name": f"f{at}", "description": "", "parameters": schema},
        }
        for at in range(count)
    ]


def _schema(count: int) -> dict[str, Any]:
    properties = {f"member{at}": {"type": "integer"} for at in range(count)}
    return {"type": "json", "value": {"type": "object", "properties": properties}}


def _generate(text: str, **parameters: Any) -> dict[str, Any]:
    return {"inputs": text, "parameters": {"max_new_tokens": 2, **parameters}}


def _ids(count: int, **parameters: Any) -> pb.GenerateRequest:
    ids = pb.TokenIds(ids=[1000 + at * 7 % 2000 for at in range(count)])
    parameters = {"max_new_tokens": 2, **parameters}
    return pb.GenerateRequest(input_ids=ids, parameters=pb.GenerateParameters(**parameters))


def _text(text: str, **parameters: Any) -> pb.GenerateRequest:
    parameters = {"max_new_tokens": 2, **parameters}
    return pb.GenerateRequest(inputs=text, parameters=pb.GenerateParameters(**parameters))


async def _stream(channel: aio.Channel, arrived: Arrived) -> None:
    request = bytes(_text("What is Deep Learning?", max_new_tokens=_CONTEXT // 2))
    async for _ in channel.unary_stream(METHOD)(request):
        arrived.num_tokens += 1


async def _idle(_: Clients) -> None:
    await asyncio.sleep(1.0)


def kinds() -> dict[str, Send]:
    """The requests. Those of gRPC are made before: their classes are slow."""
    long, most, chat = _words(2_000_000), _words(330_000), "/v1/chat/completions"
    many_ids = _ids(_CONTEXT - 8)
    prompt = _text(_words(300_000), decoder_input_details=True)
    top = {"details": True, "top_n_tokens": 5, "max_new_tokens": 4096}
    tools = json.dumps(_tools(10))
    return {
        "streams alone": _idle,
        "a prompt of 2.0 MB, refused": lambda to: to.post("/generate", _generate(long)),
        "a prompt of 330 KB": lambda to: to.post("/generate", _generate(most)),
        "2.0 MB, truncated": lambda to: to.post("/generate", _generate(long, truncate=130_000)),
        "131,064 token ids, gRPC": lambda to: to.call("Generate", many_ids),
        "chat, 900 messages, 1.9 MB": lambda to: to.post(chat, _chat(900, 1_900_000)),
        "chat, 4,096 messages, 330 KB": lambda to: to.post(chat, _chat(4096, 330_000)),
        "chat, 255 messages, 15 KB": lambda to: to.post(chat, _chat(255, 15_900)),
        "chat, 1,024 tools": lambda to: to.post(chat, _chat(1, 100, tools=_tools(1024))),
        "chat, 10 tools": lambda to: to.post(chat, _chat(1, 100, tools=json.loads(tools))),
        "a schema of 4,000 members": lambda to: to.post(
            chat, _chat(1, 100, response_format=_schema(4000))
        ),
        "details of a prompt of 300 KB": lambda to: to.post(
            "/generate", _generate(_words(300_000), decoder_input_details=True)
        ),
        "details of a prompt, gRPC": lambda to: to.call("Generate", prompt),
        "4,096 tokens with 5 likeliest": lambda to: to.post("/generate", _generate("hi", **top)),
        "4,096 tokens, gRPC": lambda to: to.call("Generate", _text("hi", **top)),
        "chat, 4,096 log-probabilities": lambda to: to.post(
            chat, {**_chat(1, 100, logprobs=True, top_logprobs=5), "max_tokens": 4096}
        ),
        "tokens of 1.0 MB": lambda to: to.post("/tokenize", {"inputs": _words(1_040_000)}),
        "tokens of 900 messages": lambda to: to.post("/chat_tokenize", _chat(900, 900_000)),
        "metrics": lambda to: to.rest.get("/metrics"),
    }


def blocks(path: Path, begun: float, ended: float) -> list[dict[str, Any]]:
    """What the service has noted between two times of the monotonic clock."""
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if begun <= line["at"] <= ended]


async def measure(kind: str, send: Send, clients: Clients, path: Path, repeat: int) -> Row:
    """A kind of request."""
    begun = time.monotonic()
    for _ in range(repeat):
        await send(clients)
    seconds = (time.monotonic() - begun) / repeat
    await asyncio.sleep(_AFTER_S)
    found = blocks(path, begun, time.monotonic())
    longest = max(found, key=lambda line: float(line["ms"]), default={"ms": 0.0, "seen": []})
    num_blocks = sum(line["ms"] > _GOAL_MS for line in found)
    return Row(kind, seconds, longest["ms"], num_blocks, "; ".join(longest["seen"]))


async def run(only: list[str], repeat: int) -> list[Row]:
    """All kinds, or those with one of these parts of a name; the first one warms up."""
    port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocks.jsonl"
        path.touch()
        command = [
            *(sys.executable, "-m", "benchmarks.echo_server", str(_STEP_S)),
            *(f"--port={port}", f"--grpc-port={grpc_port}", "--log-level=error"),
            *(f"--max-total-tokens={_CONTEXT}", "--drain-seconds=1", f"--watch={path}"),
        ]
        options = [("grpc.max_receive_message_length", 64 * _MIB)]
        async with (
            process(command, f"http://127.0.0.1:{port}") as url,
            http_client(url) as rest,
            aio.insecure_channel(f"127.0.0.1:{grpc_port}", options=options) as channel,
        ):
            clients, arrived, rows = Clients(rest, channel), Arrived(), []
            streams = [partial(_stream, channel)] * _NUM_STREAMS
            chosen = {
                kind: send for kind, send in kinds().items() if any(part in kind for part in only)
            }
            async with running(streams, arrived):
                if not path.read_text():  # every start makes some
                    raise RuntimeError("nobody has watched the service")
                for kind, send in chosen.items():
                    await send(clients)
                    print(kind, file=sys.stderr, flush=True)
                    rows.append(await measure(kind, send, clients, path, repeat))
        return rows


def main() -> None:
    """Measures, and prints the table, the verdict and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="requests of each kind")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of kinds' names")
    parser.add_argument("--tiny", action="store_true", help="a test of this script")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.only, arguments.repeat = ["255 messages"], 1
    found = machine.describe()
    print(machine.line(found))
    rows = asyncio.run(run(arguments.only, arguments.repeat))
    header = ["", "seconds", "longest, ms", f"above {_GOAL_MS:g} ms", "where"]
    cells = [
        [row.kind, f"{row.seconds:.2f}", f"{row.longest_ms:.1f}", str(row.num_blocks), row.where]
        for row in rows
    ]
    print(table(header, cells))
    longest = max(row.longest_ms for row in rows)
    goals = [Target("longest block, by 5 ms", longest / _GOAL_MS, 1.0, at_least=False)]
    print(targets_table(goals))
    print(last_line({"machine": found, "rows": [asdict(row) for row in rows]}, goals))


if __name__ == "__main__":
    main()
