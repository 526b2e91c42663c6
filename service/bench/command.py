"""The command itself: prepares prompts, warms the server up, measures, reports."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from ..client.credentials import Credentials
from ..client.target import Target, TargetError
from ..workers.gather import gather
from .arrivals import poisson_arrivals
from .grpc_transport import GrpcTransport
from .load import Clock, RealClock, Send, measure, run_closed, run_open
from .options import BenchOptions
from .prompts import Prompt, PromptMaker
from .queue_time import mean_queue_s
from .report import Report
from .rest_transport import RestTransport
from .sample import Sample
from .summary import summarise
from .transport import RequestFailed, Task, Transport

_TOKENIZE_AT_ONCE = 4
_PROGRESS_DELAY_S = 0.3  # no bar for what ends sooner, e.g. without a server


def run(options: BenchOptions) -> int:
    """Measures and prints; returns the exit code: 1 if no request succeeded.

    Raises:
        TargetError: the server cannot be reached, or does not speak TGI's API.
    """
    report = asyncio.run(_run(options))
    sys.stdout.write(report.table())
    if options.json:
        sys.stdout.write(report.json() + "\n")
    return 0 if report.summary.succeeded else 1


async def _run(options: BenchOptions) -> Report:
    async with _connected(options.target, options.credentials) as transport:
        return await bench(transport, options, RealClock())


async def bench(transport: Transport, options: BenchOptions, clock: Clock) -> Report:
    """Measures a server.

    Raises:
        TargetError: it cannot be reached, or the requests are not valid.
    """
    ready = await prepare(transport, options, clock)
    with _explained(options.target):
        before = await transport.metrics()
    samples = await measure_all(transport, options, ready, clock)
    return Report(
        options=options,
        prompt_tokens=sum(prompt.num_tokens for prompt in ready.prompts) / len(ready.prompts),
        summary=summarise(samples, options.output_tokens),
        queue_s=await _queue_s(transport, before),
    )


@dataclass(frozen=True, slots=True)
class Ready:
    """What is measured, once the server is warm: the prompts, and the seed of all samplings."""

    prompts: list[Prompt]
    seed: int


async def prepare(transport: Transport, options: BenchOptions, clock: Clock) -> Ready:
    """Makes prompts and warms the server up.

    Raises:
        TargetError: it cannot be reached, or the requests are not valid.
    """
    with _explained(options.target):
        # New prompts in every run: the server's cache may still hold those of the last one.
        maker = PromptMaker(transport.token_stops, options.input_tokens, secrets.randbits(64))
        await maker.prepare(options.shared_prefix)
        seed = await _warm_up(transport, options, await _prompts(maker, 0, options.warm_up), clock)
        return Ready(await _prompts(maker, options.warm_up, options.requests), seed)


async def _prompts(maker: PromptMaker, first: int, count: int) -> list[Prompt]:
    permits = asyncio.Semaphore(_TOKENIZE_AT_ONCE)
    with _progress("prompts", count) as advance:

        async def make(index: int) -> Prompt:
            async with permits:
                prompt = await maker.make(index)
            advance()
            return prompt

        return await gather(make(index) for index in range(first, first + count))


async def _warm_up(
    transport: Transport, options: BenchOptions, prompts: list[Prompt], clock: Clock
) -> int:
    """Sends the warm-up requests, which open connections; returns the seed of the measured ones.

    Each request tries another seed, and the one with the longest text is chosen, so that measured
    texts do not end early. See `transport.TEMPERATURE`.
    """
    if not prompts:
        return options.seed
    found: dict[int, Sample] = {}

    async def send(index: int, due: float) -> Sample:
        seed = options.seed + index
        task = Task(prompts[index].text, options.output_tokens, seed)
        found[seed] = await measure(transport, task, due, limit_s=options.timeout, clock=clock)
        return found[seed]

    with _progress("warming up", len(prompts)) as advance:
        concurrency = options.concurrency or len(prompts)
        await run_closed(_counted(send, advance), len(prompts), concurrency, clock)
    _refuse_invalid(list(found.values()))
    return max(sorted(found), key=lambda seed: len(found[seed].arrivals))


def _refuse_invalid(samples: list[Sample]) -> None:
    """Raises TargetError if every request was invalid, as the measured ones would be."""
    failures = [sample.failure for sample in samples if sample.failure]
    if len(failures) == len(samples) and all(item.error_type == "validation" for item in failures):
        raise TargetError(str(failures[0]))


async def measure_all(
    transport: Transport, options: BenchOptions, ready: Ready, clock: Clock
) -> list[Sample]:
    """Sends the prompts in the loop that the options ask for; returns a sample of each."""

    async def send(index: int, due: float) -> Sample:
        task = Task(ready.prompts[index].text, options.output_tokens, ready.seed)
        return await measure(transport, task, due, limit_s=options.timeout, clock=clock)

    count = len(ready.prompts)
    with _progress("requests", count) as advance:
        counted = _counted(send, advance)
        if options.rate is None:
            assert options.concurrency is not None
            return await run_closed(counted, count, options.concurrency, clock)
        return await run_open(counted, poisson_arrivals(options.rate, count, options.seed), clock)


async def _queue_s(transport: Transport, before: str) -> float | None:
    try:
        return mean_queue_s(before, await transport.metrics())
    except RequestFailed:
        return None  # the server ended; the counted failures show that


def _counted(send: Send, advance: Callable[[], object]) -> Send:
    async def counted(index: int, due: float) -> Sample:
        sample = await send(index, due)
        advance()
        return sample

    return counted


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], object]]:
    bar = tqdm(total=total, desc=what, file=sys.stderr, leave=False, delay=_PROGRESS_DELAY_S)
    with bar:
        yield bar.update


@contextmanager
def _explained(target: Target) -> Iterator[None]:
    """Names the target in the errors of the block."""
    try:
        yield
    except (RequestFailed, TargetError) as error:
        raise TargetError(f"cannot measure {target.url}: {error}") from error


@asynccontextmanager
async def _connected(target: Target, credentials: Credentials) -> AsyncIterator[Transport]:
    kind = GrpcTransport if target.transport == "grpc" else RestTransport
    transport: Transport = kind(target, credentials)
    try:
        yield transport
    finally:
        await transport.close()
