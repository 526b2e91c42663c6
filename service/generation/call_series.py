"""The series of gRPC calls, which include those that Envoy makes from REST requests.

No label has values that callers choose: methods are those that there are, and of the names of API
keys, which an operator may change for years, the first `MAX_CALLERS` are told apart.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from ..errors import ErrorKind
from ..metrics.histogram import HistogramFamily

MAX_CALLERS = 128
OTHER_CALLERS = "other"

# With which calls end, as far as they end by what this server does.
_CODES = ("OK", *dict.fromkeys(kind.grpc_code.name for kind in ErrorKind))

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class CallSeries:
    """What calls count.

    Args:
        registry: what shows the series.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._in_progress = Gauge(
            "grpc_server_in_progress", "Calls being served", ["method"], registry=registry
        )
        self._handled = Counter(
            "grpc_server_handled", "Calls ended, by status", ["method", "code"], registry=registry
        )
        # Callers without a key have no label of their own: there can be any number of them.
        self._by_caller = Counter(
            "tokenwire_calls",
            "Calls ended, by the name of their API key",
            ["caller", "code"],
            registry=registry,
        )
        self._seconds = HistogramFamily(
            "grpc_server_handling_seconds", "Duration of calls", _SECONDS, registry, "method", ()
        )
        self._callers: set[str] = set()
        self.expect_callers([""])

    def expect_methods(self, methods: Iterable[str]) -> None:
        """Shows the series of methods, by their full names, before they are called."""
        for method in methods:
            self._in_progress.labels(method)
            self._seconds.of(method)
            for code in _CODES:
                self._handled.labels(method, code)

    def expect_callers(self, names: Iterable[str]) -> None:
        """Shows the series of callers before they call."""
        for name in names:
            for code in _CODES:
                self._by_caller.labels(self._label(name), code)

    def begun(self, method: str) -> None:
        """A call began."""
        self._in_progress.labels(method).inc()

    def ended(self, method: str, code: str, seconds: float, key_name: str | None = None) -> None:
        """A call ended, which had a key of this name, if any."""
        self._in_progress.labels(method).dec()
        self._handled.labels(method, code).inc()
        self._by_caller.labels(self._label(key_name or ""), code).inc()
        self._seconds.of(method).observe(seconds)

    def _label(self, name: str) -> str:
        if name not in self._callers:
            if len(self._callers) > MAX_CALLERS:  # with the empty name
                return OTHER_CALLERS
            self._callers.add(name)
        return name
