"""How long it takes to read a request, by size and by face.

A REST body is read by msgspec, typed and strict, and once more by the standard library for
duplicate names. A gRPC message is read by google's parser, which is strict, and by betterproto2,
which keeps the order of keys. Until November 2026 REST bodies came as messages, made by Envoy, so
the second
column is also what a REST request cost then. Beside them: orjson alone, which checks no type.

    .venv/bin/python -m benchmarks.request_parsing

The last line is one JSON document: microseconds, the median of many rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import betterproto2
import orjson

from benchmarks import machine
from benchmarks.report import table
from engine.protocol.config import EngineInfo
from service.api import rpc
from service.codec.requests import READERS
from service.generation.configured_limits import make_limits
from service.launch.settings import Settings
from service.pb.google.api import HttpBody
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE

INFO = EngineInfo(
    model_id="none",
    model_sha=None,
    dtype="torch.float32",
    device="cpu",
    vocab_size=32,
    max_total_tokens=2048,
    max_batch_total_tokens=2048,
    block_size=16,
    attention="none",
)
WORDS = "How do rivers find their way to the sea? "
ROUND_S = 0.05
NUM_ROUNDS = 15


def text(size: int) -> dict[str, Any]:
    """One long prompt."""
    return {"inputs": WORDS * (size // len(WORDS)), "parameters": {"max_new_tokens": 20}}


def chat(size: int) -> dict[str, Any]:
    """A conversation of turns of 400 bytes."""
    turn = WORDS * 9
    roles = ("user", "assistant")
    turns = max(size // (len(turn) + 35), 1)
    messages = [{"role": roles[i % 2], "content": turn} for i in range(turns)]
    return {"messages": messages, "max_tokens": 20, "stream": True}


def tools(size: int) -> dict[str, Any]:
    """A question with many tools, each of which has a schema."""
    schema = {
        "type": "object",
        "properties": {
            name: {"type": "string", "description": WORDS} for name in ("place", "unit", "day")
        },
        "required": ["place"],
    }
    tool = {"name": "get_weather_0000", "description": WORDS, "parameters": schema}
    num_tools = max(size // 430, 1)
    return {
        "messages": [{"role": "user", "content": WORDS}],
        "tools": [
            {"type": "function", "function": {**tool, "name": f"get_weather_{number}"}}
            for number in range(num_tools)
        ],
    }


CASES: dict[str, tuple[str, type[betterproto2.Message], dict[str, Any]]] = {
    "text, 1 KB": ("Generate", pb.GenerateRequest, text(1024)),
    "text, 100 KB": ("Generate", pb.GenerateRequest, text(100 * 1024)),
    "text, 1 MB": ("Generate", pb.GenerateRequest, text(1024 * 1024)),
    "chat, 1 KB": ("Chat", pb.ChatRequest, chat(1024)),
    "chat, 100 KB": ("Chat", pb.ChatRequest, chat(100 * 1024)),
    "chat, 1 MB": ("Chat", pb.ChatRequest, chat(1024 * 1024)),
    "tools, 1 KB": ("Chat", pb.ChatRequest, tools(1024)),
    "tools, 100 KB": ("Chat", pb.ChatRequest, tools(100 * 1024)),
}


def median_us(function: Callable[[], object]) -> float:
    """Microseconds of a call, the median of rounds."""
    started = time.perf_counter()
    function()
    calls = max(int(ROUND_S / max(time.perf_counter() - started, 1e-7)), 1)
    rounds = []
    for _ in range(NUM_ROUNDS):
        started = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - started) / calls)
    return 1e6 * statistics.median(rounds)


def measure(name: str) -> dict[str, float]:
    """One case: a body, the same as a message, and orjson."""
    method, kind, fields = CASES[name]
    body = json.dumps(fields).encode()
    message = bytes(kind.from_dict(fields))
    framed = bytes(kind(http=HttpBody(content_type="application/json", data=body)))
    limits = make_limits(Settings(), INFO)
    service = rpc.load_pool().FindServiceByName(SERVICE)
    decode = rpc._decoder(service.methods_by_name[method].input_type, READERS[method], limits)
    return {
        "bytes": len(body),
        "body": median_us(lambda: decode(framed, True)),
        "message": median_us(lambda: decode(message, False)),
        "orjson": median_us(lambda: orjson.loads(body)),
    }


def main() -> None:
    """Measures all cases, and prints a table and the JSON line."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = {name: measure(name) for name in CASES}
    rows = [
        [
            name,
            f"{figures['body']:.1f}",
            f"{figures['message']:.1f}",
            f"{figures['message'] / figures['body']:.1f}",
            f"{figures['orjson']:.1f}",
        ]
        for name, figures in results.items()
    ]
    print(table(["us", "REST body", "message", "ratio", "orjson alone"], rows))
    json.dump({"machine": machine.describe(), "us": results}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
