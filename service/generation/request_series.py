"""The series of requests: TGI's, and those about tokens, which are counted while they come."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter

from ..call_record import CallRecord, current_record
from ..metrics.histogram import Histogram, HistogramFamily
from .generation import Generation
from .limits import Limits
from .tally import Tally

# TGI: 35 buckets that grow by half, from 0.15 ms to about 146 s.
TGI_SECONDS = tuple(0.0001 * 1.5**exponent for exponent in range(1, 36))

# Why generations fail (TGI's words), and why they end.
FAILURES = ("overloaded", "validation", "template", "generation", "incomplete", "dropped")
FINISH_REASONS = ("length", "eos_token", "stop_sequence")

_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_BETWEEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class Listener(Protocol):
    """What else wants to know of requests: the metrics that are pushed."""

    def finished(self, result: Generation, num_generated: int) -> None:
        """A request succeeded."""

    def failed(self, reason: str, seconds: float) -> None:
        """A request failed, so long after its receipt."""

    def first_token(self, seconds: float, call: CallRecord | None) -> None:
        """A request got its first token, so long after its receipt."""


class RequestSeries:
    """What requests count.

    Args:
        registry: what shows the series.
        limits: those in force, which bound the buckets of lengths.
        speculate: the most draft tokens of a sequence and step.
        listeners: are told of the same events.
    """

    def __init__(
        self, registry: CollectorRegistry, limits: Limits, speculate: int, *listeners: Listener
    ) -> None:
        self._registry = registry
        self._listeners = listeners
        self._add_counters()
        self._add_durations()
        self._add_lengths(limits)
        self._add_tokens(speculate)

    def _add_counters(self) -> None:
        registry = self._registry
        self._begun = Counter("tgi_request_count", "Generations begun", registry=registry)
        self._succeeded = Counter("tgi_request_success", "Generations finished", registry=registry)
        failed = Counter(
            "tgi_request_failure", "Generations that failed", ["err"], registry=registry
        )
        self._failed = {reason: failed.labels(reason) for reason in FAILURES}
        ended = Counter(
            "tokenwire_request_finished",
            "Requests finished, by why their last text ended",
            ["reason"],
            registry=registry,
        )
        self._ended = {reason: ended.labels(reason) for reason in FINISH_REASONS}

    def _add_durations(self) -> None:
        self._total = self._seconds("tgi_request_duration", "From receipt to the last token")
        self._validation = self._seconds(
            "tgi_request_validation_duration", "From receipt until queued"
        )
        self._queue = self._seconds(
            "tgi_request_queue_duration", "From queued until the first step"
        )
        self._inference = self._seconds(
            "tgi_request_inference_duration", "From the first step to the end"
        )
        self._per_token = self._seconds(
            "tgi_request_mean_time_per_token_duration", "Inference time over generated tokens"
        )
        self._to_first = HistogramFamily(
            "tokenwire_time_to_first_token_seconds",
            "From receipt of a request to its first token",
            _FIRST_TOKEN_SECONDS,
            self._registry,
        ).of()
        self._between = HistogramFamily(
            "tokenwire_inter_token_latency_seconds",
            "Between two steps that give a request tokens",
            _BETWEEN_SECONDS,
            self._registry,
        ).of()

    def _add_lengths(self, limits: Limits) -> None:
        """TGI has 100 equal buckets up to the limit."""
        prompt, total = limits.max_input_tokens, limits.max_total_tokens
        self._input_length = self._hundredths("tgi_request_input_length", "Prompt tokens", prompt)
        self._max_new_tokens = self._hundredths(
            "tgi_request_max_new_tokens", "Tokens asked for", total
        )
        self._generated = self._hundredths(
            "tgi_request_generated_tokens", "Tokens generated", total
        )

    def _add_tokens(self, speculate: int) -> None:
        registry = self._registry
        prompt = Counter(
            "tokenwire_prompt_tokens",
            "Prompt tokens, by whether the KV cache had them",
            ["source"],
            registry=registry,
        )
        self._cached, self._computed = prompt.labels("cache"), prompt.labels("computed")
        self._tokens = Counter(
            "tokenwire_generated_tokens", "Tokens generated so far", registry=registry
        )
        self._queries = Counter(
            "tokenwire_prefix_cache_queries",
            "Prompt tokens looked for in the KV cache",
            registry=registry,
        )
        self._hits = Counter(
            "tokenwire_prefix_cache_hits", "Prompt tokens found in the KV cache", registry=registry
        )
        self._forced = Counter(
            "tokenwire_grammar_forced_tokens",
            "Generated tokens that a grammar forced, without a forward pass",
            registry=registry,
        )
        self._skipped = HistogramFamily(
            "tgi_request_skipped_tokens",
            "Accepted draft tokens of a sequence in a step",
            range(speculate + 1),
            registry,
        ).of()

    def begun(self) -> None:
        """A generation was requested."""
        self._begun.inc()

    def validated(self, num_input: int, max_new_tokens: int) -> None:
        """A generation passed validation."""
        self._input_length.observe(num_input)
        self._max_new_tokens.observe(max_new_tokens)

    def failed(self, reason: str, seconds: float) -> None:
        """A generation failed, for one of `FAILURES`, so many seconds after its receipt."""
        self._failed[reason].inc()
        for listener in self._listeners:
            listener.failed(reason, seconds)

    def finished(self, result: Generation, num_generated: int | None = None) -> None:
        """A request succeeded: its last text, and the tokens of all its texts."""
        timings, num_tokens, trace_id = result.timings, len(result.tokens), _trace_id()
        num_all = num_tokens if num_generated is None else num_generated
        self._succeeded.inc()
        self._ended[result.finish_reason].inc()
        self._total.observe(timings.total, trace_id=trace_id)
        self._validation.observe(timings.validation, trace_id=trace_id)
        self._queue.observe(timings.queue, trace_id=trace_id)
        self._inference.observe(timings.inference, trace_id=trace_id)
        self._per_token.observe(timings.inference / max(num_tokens, 1), trace_id=trace_id)
        self._generated.observe(num_all, trace_id=trace_id)
        for listener in self._listeners:
            listener.finished(result, num_all)

    def step(self, tally: Tally) -> None:
        """A step of the engine gave requests tokens, or began some."""
        self._count_tokens(tally)
        for last, count in tally.previous.items():
            self._between.observe(tally.now - last, count)
        for pace in tally.first:
            seconds = tally.now - pace.begun
            trace_id = "" if pace.call is None else pace.call.recorded_trace
            self._to_first.observe(seconds, trace_id=trace_id)
            for listener in self._listeners:
                listener.first_token(seconds, pace.call)

    def _count_tokens(self, tally: Tally) -> None:
        self._tokens.inc(tally.num_tokens)
        if num_prompt := tally.num_prompt_tokens:
            self._queries.inc(num_prompt)
            self._hits.inc(tally.num_cached_tokens)
            self._cached.inc(tally.num_cached_tokens)
            self._computed.inc(num_prompt - tally.num_cached_tokens)
        if tally.num_forced:
            self._forced.inc(tally.num_forced)
        for count in tally.drafted.values():
            self._skipped.observe(count)
        self._skipped.observe(0, tally.num_sequences - len(tally.drafted))

    def _seconds(self, name: str, text: str) -> Histogram:
        return HistogramFamily(name, text, TGI_SECONDS, self._registry).of()

    def _hundredths(self, name: str, text: str, maximum: int) -> Histogram:
        bounds = [maximum / 100 * part for part in range(1, 101)]
        return HistogramFamily(name, text, bounds, self._registry).of()


def _trace_id() -> str:
    """The trace of the call that this code runs for, as far as somebody records it."""
    record = current_record()
    return "" if record is None else record.recorded_trace
