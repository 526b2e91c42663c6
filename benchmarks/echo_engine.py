"""An engine without a model, which gives every request a token at each tick of a clock.

It speaks the engine's protocol, so that a real service can be measured on it alone.

    python -m benchmarks.echo_engine SOCKET SECONDS_PER_STEP VOCAB_SIZE
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

from engine.protocol import wire
from engine.protocol.config import EngineInfo
from engine.protocol.notify import ALIVE, READY, notify
from engine.protocol.request import (
    EngineStats,
    FinishReason,
    Moment,
    MomentKind,
    Request,
    SequenceOutput,
    StepOutput,
    Token,
)

_MAX_TOKENS = 1 << 20
_MANY = 64  # tokens in a step
_CHUNK = 4096  # of a prompt that is computed
_FIRST_ID, _NUM_IDS = 1000, 2000  # of a vocabulary, where there are pieces of words


class Connection:
    """One service, and its requests with the tokens that each has so far."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.running: dict[str, tuple[Request, int]] = {}

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Takes requests until the service leaves."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                (size,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
                kind, fields = wire.parse(await reader.readexactly(size))
                if kind is wire.Kind.SUBMIT:
                    request = wire.parse_request(fields)
                    self.writer.write(wire.taken(request.request_id))
                    self.running[request.request_id] = (request, -_num_chunks(request))
                elif kind is wire.Kind.ABORT:
                    self.running.pop(fields[0], None)

    def step(self, now: float, num_running: int) -> None:
        """Sends each of its requests a token."""
        moments = tuple(
            Moment(request_id, MomentKind.STARTED, now)
            for request_id, (request, count) in self.running.items()
            if count == -_num_chunks(request)
        )
        outputs = tuple(
            output for request_id in tuple(self.running) for output in self._outputs(request_id)
        )
        stats = EngineStats(num_running=num_running, num_blocks=1, num_free_blocks=1)
        self.writer.write(wire.step(StepOutput(outputs=outputs, stats=stats, moments=moments)))

    def _outputs(self, request_id: str) -> list[SequenceOutput]:
        """A token; those whose likeliest are asked for come many at a time, to be long soon."""
        request, _ = self.running[request_id]
        found = []
        for _ in range(_MANY if request.sampling.top_n_tokens else 1):
            if request_id in self.running:
                found.append(self._output(request_id, *self.running[request_id]))
        return found

    def _output(self, request_id: str, request: Request, count: int) -> SequenceOutput:
        is_first = count == -_num_chunks(request)
        if count < 0:
            self.running[request_id] = (request, count + 1)
            return SequenceOutput(
                request_id, prompt_logprobs=_chunk(request, count), first_scheduled=is_first
            )
        is_last = count + 1 >= request.max_new_tokens
        if is_last:
            del self.running[request_id]
        else:
            self.running[request_id] = (request, count + 1)
        top = tuple((_FIRST_ID + at, -1.0 - at) for at in range(request.sampling.top_n_tokens))
        return SequenceOutput(
            request_id,
            token=Token(_FIRST_ID + count * 7 % _NUM_IDS, -0.5, top),
            finish_reason=FinishReason.LENGTH if is_last else None,
            first_scheduled=is_first,
        )


def _num_chunks(request: Request) -> int:
    """Steps that compute the prompt, as far as there is something to say of it."""
    return -(-len(request.prompt_token_ids) // _CHUNK) if request.prompt_logprobs else 0


def _chunk(request: Request, count: int) -> tuple[float | None, ...]:
    """The prompt's log-probabilities of a step; `count` more follow, as a negative number."""
    begin = (count + _num_chunks(request)) * _CHUNK
    places = range(begin, min(begin + _CHUNK, len(request.prompt_token_ids)))
    return tuple(-0.001 * at if at else None for at in places)


async def serve(path: Path, interval_s: float, vocab_size: int) -> None:
    """Serves until it is ended."""
    info = EngineInfo(
        model_id="echo",
        model_sha=None,
        dtype="none",
        device="cpu",
        vocab_size=vocab_size,
        max_total_tokens=_MAX_TOKENS,
        max_batch_total_tokens=_MAX_TOKENS,
        block_size=16,
        attention="none",
    )
    connections: set[Connection] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        writer.write(wire.ready(info))
        connections.add(connection)
        await connection.read(reader)
        connections.discard(connection)

    await asyncio.start_unix_server(connected, path)
    notify(READY)
    loop = asyncio.get_running_loop()
    tick = loop.time()
    while True:
        num_running = sum(len(connection.running) for connection in connections)
        for connection in connections:
            connection.step(loop.time(), num_running)
            connection.writer.write(wire.beat(0.0))
        notify(ALIVE)
        tick = max(tick + interval_s, loop.time())
        await asyncio.sleep(tick - loop.time())


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
