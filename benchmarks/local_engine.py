"""Runs an engine in this process and records when its tokens are published."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from benchmarks.load import Item
from engine.build import build_engine
from engine.engine import Engine
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request, StepOutput


@dataclass(frozen=True, slots=True)
class Step:
    """A step, with its start and end in seconds of `time.perf_counter`."""

    started: float
    ended: float
    output: StepOutput

    @property
    def seconds(self) -> float:
        """Its duration, publishing included."""
        return self.ended - self.started

    def is_decode(self, batch: int) -> bool:
        """Whether exactly `batch` sequences decoded a token and no prompt was computed."""
        output = self.output
        return output.num_scheduled_tokens == batch and not output.num_prefill_tokens


@dataclass(slots=True)
class Run:
    """The results of a load by request id, in the order of its items."""

    started: float
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    arrivals: dict[str, list[float]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds from the first request to the last token."""
        return max(times[-1] for times in self.arrivals.values()) - self.started

    @property
    def num_tokens(self) -> int:
        """The total number of generated tokens."""
        return sum(map(len, self.tokens.values()))

    def decode_steps(self, batch: int) -> list[Step]:
        """The steps that only decoded `batch` sequences."""
        return [step for step in self.steps if step.is_decode(batch)]


class LocalEngine:
    """Runs loads on an engine.

    Args:
        engine: an idle engine.
        attention: the name of its attention kernels, for reports.
        adapters: the digests of those that are loaded.
    """

    def __init__(self, engine: Engine, attention: str, adapters: Sequence[str] = ()) -> None:
        self.engine = engine
        self.attention = attention
        self.adapters = adapters
        self._ids = itertools.count()

    @classmethod
    def build(cls, config: EngineConfig) -> Self:
        """Builds an engine that loads its model as the configuration says."""
        engine, info = build_engine(config)
        gc.collect()
        gc.freeze()  # as the engine's own process does
        return cls(engine, info.attention, [one.digest for one in info.adapters])

    def run(self, items: Iterable[Item]) -> Run:
        """Runs all items at once, to their ends."""
        run = self.start(items)
        while self.engine.has_work:
            self.step(run)
        return run

    def start(self, items: Iterable[Item]) -> Run:
        """Starts a run: adds items without computing anything."""
        run = Run(time.perf_counter())
        self.add(run, items)
        return run

    def add(self, run: Run, items: Iterable[Item]) -> list[str]:
        """Adds more items to a run; returns their ids."""
        ids = []
        for item in items:
            request_id = f"bench-{next(self._ids)}"
            request = Request(
                request_id=request_id,
                prompt_token_ids=tuple(item.prompt),
                max_new_tokens=item.new_tokens,
                adapter=item.adapter,
            )
            refused = self.engine.add(request)
            if refused is not None:
                raise RuntimeError(refused.error)
            for values in (run.tokens, run.logprobs, run.arrivals):
                values[request_id] = []
            ids.append(request_id)
        return ids

    def step(self, run: Run) -> Step:
        """Computes a step and records its tokens."""
        started = time.perf_counter()
        output = self.engine.step()
        step = Step(started, time.perf_counter(), output)
        run.steps.append(step)
        for part in output.outputs:
            if part.error is not None:
                raise RuntimeError(part.error)
            if part.token is not None:
                run.tokens[part.request_id].append(part.token.token_id)
                run.logprobs[part.request_id].append(part.token.logprob)
                run.arrivals[part.request_id].append(step.ended)
        return step


def median_seconds(steps: Iterable[Step]) -> float:
    """The median duration of steps."""
    return statistics.median(step.seconds for step in steps)


def gaps(arrivals: Iterable[list[float]]) -> list[float]:
    """Seconds between consecutive tokens of a stream, for all streams together."""
    return [later - earlier for times in arrivals for earlier, later in itertools.pairwise(times)]
