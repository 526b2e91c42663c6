"""Prometheus series under TGI's names (router/src/server.rs at v2.1.1), and some of our own."""

from __future__ import annotations

import re

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from engine.protocol.request import StepOutput

from .generator import Generation
from .limits import Limits

# TGI: 35 buckets that grow by half, from 0.15 ms to about 146 s.
_SECONDS = tuple(0.0001 * 1.5**exponent for exponent in range(1, 36))


def _hundredths(maximum: int) -> tuple[float, ...]:
    """100 equal buckets up to a limit, as TGI has them for token counts."""
    return tuple(maximum / 100 * part for part in range(1, 101))


class Metrics:
    """All series of one service process."""

    def __init__(self, limits: Limits) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # TGI has no *_created series
        self._registry = CollectorRegistry()
        self._add_generation_series(limits)
        self._add_engine_series()
        self._add_call_series()

    def _add_generation_series(self, limits: Limits) -> None:
        """The series that TGI has per request."""
        self._requests = self._counter("tgi_request_count", "Generations begun")
        self._successes = self._counter("tgi_request_success", "Generations finished")
        self._failures = self._counter("tgi_request_failure", "Generations that failed", "err")
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
        self._input_length = self._histogram(
            "tgi_request_input_length", "Prompt tokens", _hundredths(limits.max_input_tokens)
        )
        total = _hundredths(limits.max_total_tokens)
        self._max_new_tokens = self._histogram(
            "tgi_request_max_new_tokens", "Tokens asked for", total
        )
        self._generated = self._histogram("tgi_request_generated_tokens", "Tokens generated", total)

    def _add_engine_series(self) -> None:
        """The series that are set after every step of the engine."""
        self._queue_size = self._gauge("tgi_queue_size", "Requests that wait for their first step")
        self._batch_size = self._gauge("tgi_batch_current_size", "Requests in the batch")
        self._batch_inferences = self._counter("tgi_batch_inference_count", "Steps", "method")
        self._batch_seconds = self._seconds(
            "tgi_batch_inference_duration", "Duration of a step", "method"
        )
        self._forward_seconds = self._seconds(
            "tgi_batch_forward_duration", "Duration of a step's forward pass", "method"
        )
        self._blocks = self._gauge("tokenwire_kv_blocks", "Blocks of the KV cache", "state")
        self._preemptions = self._gauge("tokenwire_preemptions", "Sequences recomputed so far")
        self._prompt_tokens = self._gauge(
            "tokenwire_prompt_tokens", "Prompt tokens so far", "source"
        )

    def _add_call_series(self) -> None:
        """The series of gRPC calls, which include those that Envoy makes from REST requests."""
        self._in_progress = self._gauge("grpc_server_in_progress", "Calls being served", "method")
        self._handled = self._counter(
            "grpc_server_handled", "Calls ended, by status", "method", "code"
        )
        # Callers without a key have no label of their own: there can be any number of them.
        self._calls = self._counter(
            "tokenwire_calls", "Calls ended, by the name of their API key", "caller", "code"
        )
        self._handling = self._seconds("grpc_server_handling_duration", "Calls' duration", "method")

    def request_begun(self) -> None:
        """A generation was requested."""
        self._requests.inc()

    def request_validated(self, num_input: int, max_new_tokens: int) -> None:
        """A generation passed validation."""
        self._input_length.observe(num_input)
        self._max_new_tokens.observe(max_new_tokens)

    def request_failed(self, reason: str) -> None:
        """A generation failed: `reason` is "overloaded", "validation", "dropped" and so on."""
        self._failures.labels(reason).inc()

    def request_finished(self, result: Generation, num_generated: int | None = None) -> None:
        """A request succeeded: its last text, and the tokens of all its texts."""
        timings, num_tokens = result.timings, len(result.tokens)
        self._successes.inc()
        self._total.observe(timings.total)
        self._validation.observe(timings.validation)
        self._queue.observe(timings.queue)
        self._inference.observe(timings.inference)
        self._per_token.observe(timings.inference / max(num_tokens, 1))
        self._generated.observe(num_tokens if num_generated is None else num_generated)

    def step(self, output: StepOutput) -> None:
        """The engine computed a step, or sent a heartbeat, which has no scheduled tokens."""
        stats = output.stats
        self._queue_size.set(stats.num_waiting)
        self._batch_size.set(stats.num_running)
        self._blocks.labels("free").set(stats.num_free_blocks)
        self._blocks.labels("used").set(stats.num_blocks - stats.num_free_blocks)
        self._preemptions.set(stats.num_preemptions)
        self._prompt_tokens.labels("cache").set(stats.num_cached_tokens)
        self._prompt_tokens.labels("computed").set(
            stats.num_prompt_tokens - stats.num_cached_tokens
        )
        if output.num_scheduled_tokens:
            method = "prefill" if output.num_prefill_tokens else "decode"
            self._batch_inferences.labels(method).inc()
            self._batch_seconds.labels(method).observe(output.duration_s)
            self._forward_seconds.labels(method).observe(output.forward_s)

    def call_begun(self, method: str) -> None:
        """A gRPC call began."""
        self._in_progress.labels(method).inc()

    def call_ended(
        self, method: str, code: str, seconds: float, key_name: str | None = None
    ) -> None:
        """A gRPC call ended, which had a key of this name, if any."""
        self._in_progress.labels(method).dec()
        self._handled.labels(method, code).inc()
        self._calls.labels(key_name or "", code).inc()
        self._handling.labels(method).observe(seconds)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format; counters without `_total`, which TGI's lack."""
        return re.sub(rb"(?m)((?:tgi|grpc)_\w+)_total\b", rb"\1", generate_latest(self._registry))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry, buckets=_SECONDS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, registry=self._registry, buckets=buckets)
