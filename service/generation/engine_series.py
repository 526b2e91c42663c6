"""The series of the engine: its batch, its steps, its cache, its restarts.

They are the engine's, whichever service tells them. Its gauges are the same in several services of
one engine; each of its steps is counted by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Info

from engine.protocol.config import EngineInfo
from engine.protocol.request import EngineStats, StepOutput

from ..metrics.histogram import Histogram, HistogramFamily
from .engine_figures import EngineFigures
from .request_series import TGI_SECONDS

_METHODS = ("prefill", "decode")
_CONCAT_REASONS = ("backpressure", "wait_exceeded")  # TGI's; we have only the first
_BATCH_SIZES = range(1, 1025)  # TGI's buckets


class EngineSeries:
    """What the engine's steps count.

    Args:
        registry: what shows the series.
        is_healthy: whether an engine is connected and gets on.
    """

    def __init__(self, registry: CollectorRegistry, is_healthy: Callable[[], bool]) -> None:
        self._registry = registry
        self._figures = EngineFigures()
        self._replicas: tuple[Gauge, Gauge] | None = None
        self._add_gauges(is_healthy)
        self._add_durations()
        self._add_counters()

    def _add_gauges(self, is_healthy: Callable[[], bool]) -> None:
        """They are read when somebody asks: a step only leaves its figures."""
        self._gauge("tgi_queue_size", "Requests waiting for a step", lambda s: s.num_waiting)
        self._gauge("tgi_batch_current_size", "Requests in the batch", lambda s: s.num_running)
        self._gauge(
            "tgi_batch_current_max_tokens",
            "Tokens that the requests in the batch may come to",
            lambda s: s.max_running_tokens,
        )
        self._gauge(
            "tokenwire_kv_cache_usage_ratio",
            "Part of the KV cache in use, 0 to 1",
            lambda s: (s.num_blocks - s.num_free_blocks) / max(s.num_blocks, 1),
        )
        blocks = Gauge(
            "tokenwire_kv_blocks", "Blocks of the KV cache", ["state"], registry=self._registry
        )
        total = self._figures.total
        blocks.labels("free").set_function(lambda: total().num_free_blocks)
        blocks.labels("used").set_function(lambda: total().num_blocks - total().num_free_blocks)
        up = Gauge("tokenwire_engine_up", "Whether the engine gets on", registry=self._registry)
        up.set_function(lambda: float(is_healthy()))

    def _add_durations(self) -> None:
        self._step = self._seconds("tgi_batch_inference_duration", "A step")
        self._forward = self._seconds("tgi_batch_forward_duration", "Forward pass of a step")
        self._decode = self._seconds(
            "tgi_batch_decode_duration", "From the logits of a step to its tokens"
        )
        self._filter = self._seconds(
            "tgi_batch_filter_duration", "Taking requests that ended in a step out of the batch"
        )
        self._concat = self._seconds(
            "tgi_batch_concat_duration",
            "Planning a step that takes waiting requests into a batch that runs",
            ("decode",),
        )["decode"]
        self._next_size = HistogramFamily(
            "tgi_batch_next_size",
            "Waiting requests that a step takes into the batch",
            _BATCH_SIZES,
            self._registry,
        ).of()

    def _add_counters(self) -> None:
        self._steps = self._by_method("tgi_batch_inference_count", "Steps")
        self._good_steps = self._by_method("tgi_batch_inference_success", "Steps that succeeded")
        self._bad_steps = self._by_method("tgi_batch_inference_failure", "Steps that failed")
        self._replayed_steps = self._by_method(
            "tokenwire_replayed_steps",
            "Steps whose forward pass was replayed from a recording",
        )
        self._concats = self._counters(
            "tgi_batch_concat",
            "Steps that take waiting requests into a batch that runs",
            "reason",
            _CONCAT_REASONS,
        )
        self._preemptions = Counter(
            "tokenwire_preemptions",
            "Sequences taken out of the batch to be computed again later",
            registry=self._registry,
        )
        self._restarts = Counter(
            "tokenwire_engine_restarts",
            "Engines that took the place of one that died",
            registry=self._registry,
        )

    def step(self, output: StepOutput, engine: int = 1) -> None:
        """An engine computed a step, or sent a heartbeat, which has no scheduled tokens.

        What another service counts looks like a heartbeat here.
        """
        stats = output.stats
        told = self._figures.note(engine, stats)
        before = 0 if told is None else told.num_preemptions
        if output.num_scheduled_tokens:
            if stats.num_preemptions != before:  # fewer are those of a new engine
                fresh = stats.num_preemptions - before
                self._preemptions.inc(fresh if fresh > 0 else stats.num_preemptions)
            self._count_step(output)
            if output.num_started_seqs:
                self._count_started(output)

    def restarted(self) -> None:
        """Another engine has taken the place of the one before."""
        self._restarts.inc()

    def show(self, engine: int, is_healthy: Callable[[], bool]) -> None:
        """Shows one of several engines."""
        if self._replicas is None:
            self._replicas = (
                Gauge(
                    "tokenwire_replica_up",
                    "Whether one of several engines gets on",
                    ["engine"],
                    registry=self._registry,
                ),
                Gauge(
                    "tokenwire_replica_requests",
                    "Requests in one of several engines, running or waiting",
                    ["engine"],
                    registry=self._registry,
                ),
            )
        up, requests = (gauge.labels(str(engine)) for gauge in self._replicas)
        up.set_function(lambda: float(is_healthy()))
        requests.set_function(lambda: _num_requests(self._figures.of(engine)))

    def lost(self, engine: int) -> None:
        """One of several engines is gone, and with it what it computed."""
        self._figures.lose(engine)

    def describe(self, info: EngineInfo) -> None:
        """Shows what the KV cache is made of, and what is in memory; neither changes."""
        self._show_memory(info)
        Info("tokenwire_cache_config", "Size of the KV cache", registry=self._registry).info(
            {
                "block_size": str(info.block_size),
                "num_gpu_blocks": str(info.max_batch_total_tokens // info.block_size),
            }
        )

    def _show_memory(self, info: EngineInfo) -> None:
        weights, cache = (
            Gauge(name, text, ["rank"], registry=self._registry)
            for name, text in (
                ("tokenwire_weights_bytes", "Weights of the model on a rank's device"),
                ("tokenwire_kv_cache_bytes", "KV cache on a rank's device"),
            )
        )
        for rank, held in enumerate(info.ranks):
            weights.labels(str(rank)).set(held.weights_bytes)
            cache.labels(str(rank)).set(held.cache_bytes)

    def _count_step(self, output: StepOutput) -> None:
        method = "prefill" if output.num_prefill_tokens else "decode"
        self._steps[method].inc()
        (self._bad_steps if output.has_failed else self._good_steps)[method].inc()
        if output.is_replayed:
            self._replayed_steps[method].inc()
        self._step[method].observe(output.duration_s)
        self._forward[method].observe(output.forward_s)
        self._decode[method].observe(output.sample_s + output.collect_s - output.release_s)
        self._filter[method].observe(output.release_s)

    def _count_started(self, output: StepOutput) -> None:
        self._next_size.observe(output.num_started_seqs)
        if output.num_started_seqs < output.num_seqs:
            self._concats["backpressure"].inc()
            self._concat.observe(output.schedule_s)

    def _gauge(self, name: str, text: str, value: Callable[[EngineStats], float]) -> None:
        gauge = Gauge(name, text, registry=self._registry)
        gauge.set_function(lambda: value(self._figures.total()))

    def _seconds(
        self, name: str, text: str, methods: tuple[str, ...] = _METHODS
    ) -> Mapping[str, Histogram]:
        family = HistogramFamily(name, text, TGI_SECONDS, self._registry, "method", methods)
        return {method: family.of(method) for method in methods}

    def _by_method(self, name: str, text: str) -> Mapping[str, Counter]:
        return self._counters(name, text, "method", _METHODS)

    def _counters(
        self, name: str, text: str, label: str, values: tuple[str, ...]
    ) -> Mapping[str, Counter]:
        counter = Counter(name, text, [label], registry=self._registry)
        return {value: counter.labels(value) for value in values}


def _num_requests(stats: EngineStats) -> int:
    return stats.num_running + stats.num_waiting
