"""What metrics cost: microseconds per token where steps are delivered, milliseconds per scrape.

The engine's client delivers steps that are made up, once without listeners and once with all
metrics. Counting the tokens of a step is a part of delivering it, and so in both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

from engine.protocol import wire
from engine.protocol.request import EngineStats, Request, SequenceOutput, StepOutput, Token
from service.generation.engine_client import EngineClient
from service.generation.limits import Limits
from service.generation.metrics import Metrics
from service.metrics.exposition import OPENMETRICS_TYPE, TEXT_TYPE

LIMITS = Limits(
    max_concurrent_requests=128,
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_input_tokens=4000,
    max_total_tokens=4096,
    max_client_batch_size=4,
    max_choices=16,
    max_request_values=32_768,
    max_messages=4096,
    max_message_parts=1024,
    max_tools=1024,
    max_stop_sequence_bytes=1024,
    max_tokenize_bytes=1 << 20,
    vocab_size=5000,
)


def main() -> None:
    """Prints a table, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--repeat", type=int, default=7, help="rounds, of which the best counts")
    parser.add_argument("--tiny", action="store_true", help="a try-out that takes a second")
    arguments = parser.parse_args()
    repeat, num_steps = (1, 5) if arguments.tiny else (arguments.repeat, 300)
    metrics = Metrics(LIMITS)
    rows = {}
    print("streams  without metrics  with metrics   (us per step)")
    for count in arguments.streams:
        bare = asyncio.run(step_us(count, None, repeat, num_steps))
        full = asyncio.run(step_us(count, metrics, repeat, num_steps))
        rows[str(count)] = {"bare_us": bare, "metrics_us": full, "token_us": (full - bare) / count}
        print(f"{count:7} {bare:16.1f} {full:13.1f}")
    scrapes = {kind: scrape_ms(metrics, kind, repeat) for kind in (TEXT_TYPE, OPENMETRICS_TYPE)}
    for kind, milliseconds in scrapes.items():
        print(f"a scrape as {kind}: {milliseconds:.1f} ms")
    print(json.dumps({"steps": rows, "scrape_ms": scrapes}))


async def step_us(count: int, metrics: Metrics | None, repeat: int, num_steps: int) -> float:
    """Microseconds to deliver a step of so many streams, the best of some rounds."""
    client = EngineClient(Path("/nowhere"))
    if metrics is not None:
        client.on_step.append(metrics.engine.step)
        client.on_tally.append(metrics.requests.step)
    client._send = lambda _: None  # type: ignore[method-assign]  # there is no engine
    client._writer = object()  # type: ignore[assignment]
    streams = [client.generate(_request(number)) for number in range(count)]
    readers = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.sleep(0)
    best = min(_round_us(client._deliver, count, num_steps) for _ in range(repeat))
    await asyncio.gather(*readers)
    for stream in streams:
        await stream.aclose()
    return best


def _request(number: int) -> Request:
    return Request(request_id=f"r{number}", prompt_token_ids=(1, 2, 3), max_new_tokens=1000)


def _round_us(deliver: Callable[[StepOutput], None], count: int, num_steps: int) -> float:
    """Microseconds per step, of steps that are read as from the wire: none shares anything."""
    steps = [wire.parse_step(wire.parse(_frame(count))[1]) for _ in range(num_steps)]
    started = time.perf_counter()
    for step in steps:
        deliver(step)
    return (time.perf_counter() - started) / num_steps * 1e6


def _frame(count: int) -> bytes:
    outputs = tuple(SequenceOutput(f"r{number}", Token(5, -0.5)) for number in range(count))
    stats = EngineStats(num_running=count, num_blocks=100, num_free_blocks=50)
    step = StepOutput(
        outputs=outputs, stats=stats, num_scheduled_tokens=count, forward_s=5e-3, duration_s=1e-2
    )
    return wire.step(step)[wire.HEADER.size :]


def scrape_ms(metrics: Metrics, accept: str, repeat: int) -> float:
    """Milliseconds to show all series, the best of some rounds."""
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        metrics.render(accept)
        seconds.append(time.perf_counter() - started)
    return min(seconds) * 1000


if __name__ == "__main__":
    main()
