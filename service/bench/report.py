"""The result as a table for people, and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from .options import BenchOptions
from .summary import Percentiles, Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A result, with the options and prompts that it belongs to.

    Attributes:
        options: the options of the measurement.
        prompt_tokens: tokens of a prompt on average, as the server counts.
        summary: the measured values.
        queue_s: mean time in the server's queue; None if it does not report that.
    """

    options: BenchOptions
    prompt_tokens: float
    summary: Summary
    queue_s: float | None

    def table(self) -> str:
        """For people; ends with a newline."""
        lines = [self._heading(), "", *self._latencies(), "", *self._totals(), *self._failures()]
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        """For programs: one line, latencies in milliseconds."""
        options, summary = self.options, self.summary
        return json.dumps(
            {
                "target": options.target.url,
                "transport": options.target.transport,
                "loop": "closed" if options.rate is None else "open",
                "rate": options.rate,
                "concurrency": options.concurrency,
                "requests": options.requests,
                "input_tokens": round(self.prompt_tokens, 2),
                "output_tokens": options.output_tokens,
                "shared_prefix": options.shared_prefix,
                "seed": options.seed,
                "succeeded": summary.succeeded,
                "failed": summary.failed,
                "failures": [asdict(item) for item in summary.failures],
                "duration_s": round(summary.duration_s, 3),
                "requests_per_s": round(summary.requests_per_s, 3),
                "output_tokens_per_s": round(summary.output_tokens_per_s, 2),
                "generated_tokens": summary.generated_tokens,
                "ended_early": summary.ended_early,
                "first_token_ms": _milliseconds(summary.first_token),
                "inter_token_ms": _milliseconds(summary.inter_token),
                "end_to_end_ms": _milliseconds(summary.end_to_end),
                "sent_late_ms": _milliseconds(summary.lateness),
                "mean_queue_ms": None if self.queue_s is None else round(1000 * self.queue_s, 3),
            }
        )

    def _heading(self) -> str:
        options = self.options
        loop = (
            f"{options.concurrency} at a time"
            if options.rate is None
            else f"{options.rate:g} per second on average"
        )
        shared = f" ({options.shared_prefix} shared)" if options.shared_prefix else ""
        return (
            f"{options.target.url}: {options.requests} requests, {loop}, "
            f"{self.prompt_tokens:g} tokens in{shared}, {options.output_tokens} out"
        )

    def _latencies(self) -> list[str]:
        summary = self.summary
        rows = [
            ("first token", summary.first_token),
            ("between tokens", summary.inter_token),
            ("whole answer", summary.end_to_end),
        ]
        if self.options.rate is not None:
            rows.append(("sent late", summary.lateness))
        return [_row("ms", "p50", "p90", "p99"), *(_latency_row(*row) for row in rows)]

    def _totals(self) -> list[str]:
        summary = self.summary
        early = f", {summary.ended_early} of them early" if summary.ended_early else ""
        queue = "" if self.queue_s is None else f", {1000 * self.queue_s:.1f} ms in the queue"
        return [
            f"{summary.output_tokens_per_s:.1f} output tokens/s, "
            f"{summary.requests_per_s:.2f} requests/s{queue}",
            f"{summary.succeeded} succeeded{early}, {summary.failed} failed "
            f"in {summary.duration_s:.1f} s",
        ]

    def _failures(self) -> list[str]:
        return [
            f"  {item.count} x {' '.join(filter(None, (item.error_type, item.code)))}: "
            f"{item.message}"
            for item in self.summary.failures
        ]


def _latency_row(name: str, value: Percentiles | None) -> str:
    if value is None:
        return _row(name, "-", "-", "-")
    return _row(name, *(f"{1000 * item:.1f}" for item in (value.p50, value.p90, value.p99)))


def _row(name: str, *cells: str) -> str:
    return f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells)


def _milliseconds(value: Percentiles | None) -> dict[str, float] | None:
    if value is None:
        return None
    return {name: round(1000 * item, 3) for name, item in asdict(value).items()}
