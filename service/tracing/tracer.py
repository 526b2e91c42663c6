"""Makes the spans of calls: one for the RPC, below the caller's, and those of its generation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from opentelemetry import propagate
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

from ..call_record import CallRecord, Content
from .operation import OPERATIONS, SpanPlan, operation_plan

# The statuses that are a server's failure; the others are the caller's business.
_FAILURES = {
    "UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
}  # fmt: skip


class CallTracer:
    """Begins the trace of each call, or goes on with the caller's.

    Args:
        direct: makes the spans of calls on the service's own port.
        behind_gateway: those of calls that the gateway passes on, which has chosen what is kept.
        model_id: of the model that is served.
        captures_content: whether spans have the texts of prompts and answers.
    """

    def __init__(
        self, direct: Tracer, behind_gateway: Tracer, model_id: str, *, captures_content: bool
    ) -> None:
        self._tracers = {False: direct, True: behind_gateway}
        self._model_id = model_id
        self._captures_content = captures_content

    def begin(
        self,
        method: str,
        metadata: Iterable[tuple[str, str | bytes]],
        record: CallRecord,
        *,
        from_gateway: bool,
        path: str | None,
    ) -> CallSpan:
        """Begins the span of a call, whose record gets the id of its trace.

        Args:
            method: the RPC's full name.
            metadata: the caller's.
            record: the call's.
            from_gateway: whether the gateway has passed it on.
            path: what a REST caller asked for.
        """
        service, _, name = method.removeprefix("/").rpartition("/")
        attributes: dict[str, AttributeValue] = {
            "rpc.system": "grpc",
            "rpc.system.name": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "tokenwire.request_id": record.request_id,
            "tokenwire.caller": record.caller,
        }
        if path is not None:
            attributes["url.path"] = path
        epoch_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracers[from_gateway].start_span(
            f"{service}/{name}",
            propagate.extract(_carrier(metadata)),
            SpanKind.SERVER,
            attributes,
            start_time=epoch_ns + round(record.began * 1e9),
        )
        context = span.get_span_context()
        record.trace_id = f"{context.trace_id:032x}"
        record.is_sampled = context.trace_flags.sampled
        if self._captures_content and span.is_recording():
            record.content = Content()
        return CallSpan(span, self._tracers[from_gateway], name, self._model_id, record, epoch_ns)


class CallSpan:
    """The span of a call that goes on."""

    def __init__(
        self,
        span: Span,
        tracer: Tracer,
        method: str,
        model_id: str,
        record: CallRecord,
        epoch_ns: int,
    ) -> None:
        self._span = span
        self._tracer = tracer
        self._method = method
        self._model_id = model_id
        self._record = record
        self._epoch_ns = epoch_ns  # from the monotonic clock to the time since 1970

    def end(self, code: str, number: int) -> None:
        """Ends it, with those of the call's generation below it.

        Args:
            code: the name of the call's status.
            number: of the same.
        """
        span, ended = self._span, time.monotonic()
        if not span.is_recording():
            return
        # Its request may have named the call.
        span.set_attribute("tokenwire.request_id", self._record.request_id)
        span.set_attribute("rpc.grpc.status_code", number)
        span.set_attribute("rpc.response.status_code", code)
        if code != "OK":
            span.set_attribute("error.type", code)
        if code in _FAILURES:
            span.set_status(Status(StatusCode.ERROR))
        if self._method in OPERATIONS and self._record.error_type != "unauthenticated":
            self._make(operation_plan(self._record, self._method, self._model_id, ended), span)
        span.end(self._ns(ended))

    def _make(self, plan: SpanPlan, parent: Span) -> None:
        """Makes a span and those below it."""
        span = self._tracer.start_span(
            plan.name,
            set_span_in_context(parent),
            SpanKind.INTERNAL,
            _attributes(plan.attributes),
            start_time=self._ns(plan.start),
        )
        for event in plan.events:
            span.add_event(event.name, _attributes(event.attributes), self._ns(event.at))
        if plan.error_type:
            span.set_attribute("error.type", plan.error_type)
            span.set_status(Status(StatusCode.ERROR))
        for child in plan.children:
            self._make(child, span)
        span.end(self._ns(plan.end))

    def _ns(self, at: float) -> int:
        """A time of the monotonic clock, in nanoseconds since 1970."""
        return self._epoch_ns + round(at * 1e9)


def _attributes(values: Mapping[str, object]) -> Mapping[str, AttributeValue]:
    return dict(values)  # type: ignore[arg-type]  # they have only such types


def _carrier(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """What propagators read; a header that was sent twice has all its values."""
    wanted = propagate.get_global_textmap().fields
    carrier: dict[str, str] = {}
    for name, value in metadata:
        if name in wanted and isinstance(value, str):
            carrier[name] = f"{carrier[name]},{value}" if name in carrier else value
    return carrier
