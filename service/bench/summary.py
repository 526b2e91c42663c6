"""The statistics of many samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .sample import Sample
from .transport import Failure

_PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a latency, in seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class FailureCount:
    """How often one kind of failure happened, and the first message of it."""

    error_type: str
    code: str
    count: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result. Latencies and rates are those of the requests that succeeded.

    Attributes:
        succeeded: number of requests that succeeded.
        failures: the failures of the others by kind, the most frequent first.
        duration_s: from when the first request was due to the last answer's end.
        generated_tokens: tokens of all answers together.
        ended_early: answers with fewer tokens than were asked for.
        first_token: time to the first token.
        inter_token: time between two tokens of an answer.
        end_to_end: time to the end of the answer.
        lateness: how long after they were due requests were sent; large values mean that this
            machine, not the server, was too slow.
    """

    succeeded: int
    failures: tuple[FailureCount, ...]
    duration_s: float
    generated_tokens: int
    ended_early: int
    first_token: Percentiles | None
    inter_token: Percentiles | None
    end_to_end: Percentiles | None
    lateness: Percentiles | None

    @property
    def failed(self) -> int:
        """How many requests failed."""
        return sum(item.count for item in self.failures)

    @property
    def requests_per_s(self) -> float:
        """Requests that succeeded, per second."""
        return self.succeeded / self.duration_s if self.succeeded else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens of requests that succeeded, per second."""
        return self.generated_tokens / self.duration_s if self.succeeded else 0.0


def summarise(samples: Sequence[Sample], output_tokens: int) -> Summary:
    """Returns the summary of at least one sample."""
    good = [sample for sample in samples if sample.failure is None]
    counts = [len(sample.arrivals) for sample in good]
    return Summary(
        succeeded=len(good),
        failures=_count([sample.failure for sample in samples if sample.failure]),
        duration_s=max(item.ended for item in samples) - min(item.due for item in samples),
        generated_tokens=sum(counts),
        ended_early=sum(count < output_tokens for count in counts),
        first_token=percentiles([sample.first_token for sample in good]),
        inter_token=percentiles([gap for sample in good for gap in sample.gaps]),
        end_to_end=percentiles([sample.end_to_end for sample in good]),
        lateness=percentiles([sample.lateness for sample in samples]),
    )


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Returns the percentiles, interpolated between two values; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    return Percentiles(*(_quantile(ordered, percent / 100) for percent in _PERCENTS))


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _count(failures: Sequence[Failure]) -> tuple[FailureCount, ...]:
    counts = Counter((failure.error_type, failure.code) for failure in failures)
    first = {(item.error_type, item.code): item.message for item in reversed(failures)}
    return tuple(
        FailureCount(*kind, count, " ".join(first[kind].split()))
        for kind, count in counts.most_common()
    )
