"""The series of one service process: TGI's under its names (router/src/server.rs), and our own."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import Metric

from ..grammar.checker import OUTCOMES
from ..metrics.exposition import Collected, Exposition, Source
from ..metrics.histogram import HistogramFamily
from .admission import Admission
from .call_series import CallSeries
from .engine_series import EngineSeries
from .limits import Limits
from .loop_lag import LoopLag
from .request_series import Listener, RequestSeries
from .server_info import VERSION, ServerInfo

_GRAMMAR_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


_PLAIN = "tgi_"  # what the names of counters begin with that have no `_total`

# Gauges of what a service process has of its own. All others are the engine's or the server's, and
# every service process tells the same.
HELD = ("grpc_server_in_progress", "tokenwire_requests_active")


class Metrics:
    """All series of one service process.

    Args:
        limits: those in force.
        speculate: the most draft tokens of a sequence and step.
        is_healthy: whether an engine is connected and gets on.
        listeners: are told of what happens to requests.

    Attributes:
        requests: what requests count.
        engine: what the engine's steps count.
        calls: what gRPC calls count.
        loop_lag: how late the event loop is.
    """

    def __init__(
        self,
        limits: Limits,
        *listeners: Listener,
        speculate: int = 0,
        is_healthy: Callable[[], bool] = lambda: True,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # TGI has no *_created series
        registry = self._registry = CollectorRegistry()
        self._exposition = Exposition(registry, _PLAIN)
        self.requests = RequestSeries(registry, limits, speculate, *listeners)
        self.engine = EngineSeries(registry, is_healthy)
        self.calls = CallSeries(registry)
        self.loop_lag = LoopLag(registry)
        self._trials = HistogramFamily(
            "tokenwire_grammar_compile_seconds",
            "Grammars compiled on trial, by outcome",
            _GRAMMAR_SECONDS,
            registry,
            "outcome",
            OUTCOMES,
        )
        self._known_grammars = Counter(
            "tokenwire_grammar_cache_hits",
            "Grammars whose outcome was known from an earlier request",
            registry=registry,
        )
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)

    @property
    def source(self) -> Source:
        """The series of this process."""
        return self._registry

    def grammar_tried(self, outcome: str, seconds: float) -> None:
        """A grammar was compiled on trial; `outcome` is one of the checker's `OUTCOMES`."""
        self._trials.of(outcome).observe(seconds)

    def grammar_known(self) -> None:
        """A grammar needed no trial."""
        self._known_grammars.inc()

    def watch(self, admission: Admission, limits: Limits) -> None:
        """Shows how many permits there are, and how many are held."""
        held = Gauge(
            "tokenwire_requests_active", "Generations with a permit", registry=self._registry
        )
        held.set_function(lambda: admission.num_active)
        most = Gauge(
            "tokenwire_requests_limit", "Generations that may run", registry=self._registry
        )
        most.set(limits.max_concurrent_requests)

    def describe(self, server: ServerInfo) -> None:
        """Shows what is served, and which build serves it."""
        engine = server.engine
        Info("tokenwire_build", "What is running", registry=self._registry).info(
            {
                "version": VERSION,
                "revision": server.sha or "",
                "label": server.docker_label or "",
                "python": platform.python_version(),
            }
        )
        Info("tokenwire_model", "What is served", registry=self._registry).info(
            {
                "model": server.model_id,
                "revision": engine.model_sha or "",
                "dtype": engine.dtype,
                "device": engine.device,
                "attention": engine.attention,
            }
        )
        self.engine.describe(engine)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format; TGI's counters without `_total`."""
        return self.render()[1]

    def render(
        self, accept: str = "", collect: Callable[[], Iterable[Metric]] | None = None
    ) -> tuple[str, bytes]:
        """The content type and the text of all series, in the form that `Accept` asks for.

        Any thread may call this.

        Args:
            accept: the header.
            collect: makes the series of several service processes, which are shown instead.
        """
        if collect is None:
            return self._exposition.render(accept)
        return Exposition(Collected(collect()), _PLAIN).render(accept)
