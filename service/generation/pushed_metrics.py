"""The histograms of OpenTelemetry's conventions for generative models, which are pushed by OTLP.

Names, units, attributes and buckets: opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ..call_record import CallRecord, current_record
from ..launch.otlp import Export
from ..launch.place import Place
from ..metrics.otlp import make_provider
from ..metrics.resource import own_attributes
from .generation import Generation

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram
    from opentelemetry.sdk.metrics import MeterProvider

_FLUSH_MS = 5000.0  # for what is left when the service ends
_PROVIDER = "tokenwire"

_DURATION_S = tuple(0.01 * 2**exponent for exponent in range(14))
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_PER_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
_TOKENS = tuple(float(4**exponent) for exponent in range(14))


class PushedMetrics:
    """Records what happens to requests.

    Args:
        provider: pushes it.
        model: what is served; what callers call it could be anything.
    """

    def __init__(self, provider: MeterProvider, model: str) -> None:
        self._provider = provider
        self._meter = provider.get_meter(_PROVIDER)
        self._model = model
        self._duration = self._histogram(
            "gen_ai.server.request.duration", "s", "Duration of a request", _DURATION_S
        )
        self._to_first = self._histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "From receipt of a request to its first token",
            _FIRST_TOKEN_S,
        )
        self._per_token = self._histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time per token after the first one",
            _PER_TOKEN_S,
        )
        self._usage = self._histogram(
            "gen_ai.client.token.usage", "{token}", "Tokens of a request", _TOKENS
        )

    def finished(self, result: Generation, num_generated: int) -> None:
        """A request succeeded: its last text, and the tokens of all its texts."""
        attributes, timings = self._attributes(current_record()), result.timings
        self._duration.record(timings.total, attributes)
        if (seconds := timings.per_output_token(len(result.tokens))) is not None:
            self._per_token.record(seconds, attributes)
        for kind, count in (("input", result.num_prompt_tokens), ("output", num_generated)):
            self._usage.record(count, {**attributes, "gen_ai.token.type": kind})

    def failed(self, reason: str, seconds: float) -> None:
        """A request failed, so long after its receipt."""
        attributes = {**self._attributes(current_record()), "error.type": reason}
        self._duration.record(seconds, attributes)

    def first_token(self, seconds: float, call: CallRecord | None) -> None:
        """A request got its first token, so long after its receipt."""
        self._to_first.record(seconds, self._attributes(call))

    async def close(self) -> None:
        """Pushes what is left and ends."""
        await asyncio.to_thread(self._provider.shutdown, timeout_millis=_FLUSH_MS)

    def _attributes(self, call: CallRecord | None) -> dict[str, str]:
        return {
            "gen_ai.operation.name": "text_completion" if call is None else call.operation,
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
        }

    def _histogram(self, name: str, unit: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return self._meter.create_histogram(
            name, unit, text, explicit_bucket_boundaries_advisory=bounds
        )


def pushed_metrics(
    model: str, export: Export | None, place: Place | None = None
) -> PushedMetrics | None:
    """The metrics to push, if there is somewhere to push them to.

    Args:
        model: what is served.
        export: where to, and how.
        place: which of several service processes this is.

    Raises:
        ValueError: a variable has no possible value.
    """
    if export is None:
        return None
    return PushedMetrics(make_provider(export, own_attributes(place)), model)
