"""Wraps every call: lets it in or not, counts it, and turns exceptions into statuses.

No other module turns exceptions into gRPC statuses. An exception that is no `ServiceError` becomes
INTERNAL and is logged; its text is not sent to the caller.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import contextmanager, nullcontext
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from ..call_record import (
    CANCELLED,
    REQUEST_ID_HEADER,
    CallRecord,
    begin_record,
    current_record,
    note_error,
)
from ..codec.render import error_body
from ..error_bodies import ErrorFormat, error_format
from ..errors import ErrorKind, ServiceError, internal
from ..generation.metrics import Metrics
from ..routes import OPERATOR_METHODS, SERVICE
from .access_log import log_access
from .authentication import Authenticator
from .call import rest_path
from .caller import caller_of
from .calls_in_progress import CallsInProgress

if TYPE_CHECKING:  # else OpenTelemetry would be imported where there are no traces
    from ..tracing.tracer import CallSpan, CallTracer

logger = logging.getLogger(__name__)

_TRACEPARENT = "traceparent"
_RETRY_S = 1  # where nothing better is known
# The trailers contain a message three times, escaped; peers refuse trailers above 8 to 16 KiB.
_MAX_MESSAGE_BYTES = 512

# What probes and scrapers call every few seconds.
_QUIET = {
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    f"/{SERVICE}/Health",
    f"/{SERVICE}/Metrics",
}

Trailers = tuple[tuple[str, str | bytes], ...]


class CallInterceptor(aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler of a server.

    Args:
        metrics: where calls are counted.
        running: counts callers' calls while they run, not those of operators.
        tracer: makes the spans of calls, where there are traces.
        from_gateway: whether the server's calls come from the gateway.
        access_log: whether each call gets a log line at its end.
        authenticator: decides who may call; by default everyone.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        from_gateway: bool,
        access_log: bool = False,
        authenticator: Authenticator | None = None,
        tracer: CallTracer | None = None,
        running: CallsInProgress | None = None,
    ) -> None:
        self._metrics = metrics
        self._running = running or CallsInProgress()
        self._from_gateway = from_gateway
        self._access_log = access_log
        self._authenticator = authenticator or Authenticator()
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        try:
            name = self._authenticator.admit(
                method, handler_call_details.invocation_metadata, from_gateway=self._from_gateway
            )
        except ServiceError as error:
            # A handler of streams reads nothing by itself, so no byte of the request is taken.
            refuse = self._wrapped(_raising(error), method, None)
            return grpc.stream_stream_rpc_method_handler(refuse)
        if handler.unary_unary is not None:
            return handler._replace(unary_unary=self._wrapped(handler.unary_unary, method, name))
        if inspect.iscoroutinefunction(handler.unary_stream):  # it writes by itself
            return handler._replace(unary_stream=self._wrapped(handler.unary_stream, method, name))
        return handler  # reflection and health watching, which raise no ServiceError

    def _wrapped(self, function: Any, method: str, key_name: str | None) -> Any:
        async def call(request: bytes, context: aio.ServicerContext[Any, Any]) -> Any:
            metadata = dict(context.invocation_metadata() or ())
            path = rest_path(metadata.items(), from_gateway=self._from_gateway)
            caller = caller_of(
                context,
                from_gateway=self._from_gateway,
                key_name=key_name,
                takes_tenants=not self._authenticator.needs_keys,
            )
            record = begin_record(
                _text(metadata.get(REQUEST_ID_HEADER)), caller, _text(metadata.get(_TRACEPARENT))
            )
            context.set_trailing_metadata(((REQUEST_ID_HEADER, record.request_id),))
            running = nullcontext() if method in OPERATOR_METHODS else self._running.one()
            with running, self._counted(method, path, key_name, context, record):
                try:
                    reply = await function(request, context)
                    # Again, since the request may have named the call.
                    context.set_trailing_metadata(((REQUEST_ID_HEADER, record.request_id),))
                    return reply
                except Exception as error:
                    try:
                        await self._abort(context, path, error)
                    finally:
                        # It and the frames that it went through hold each other, and with them
                        # the request, which may have megabytes, until garbage is looked for.
                        clear_frames(error.__traceback__)

        return call

    async def _abort(
        self, context: aio.ServicerContext[Any, Any], path: str | None, error: Exception
    ) -> None:
        """Ends a call with the status of an error; `path` is what a REST caller asked for.

        Raises:
            aio.AbortError: always; that is how grpc.aio ends a call.
        """
        if isinstance(error, aio.AbortError):
            raise error
        if not isinstance(error, ServiceError):
            logger.error("a call failed unexpectedly", exc_info=error)
            error = internal()
        note_error(error.kind.error_type)
        if path is None:
            message = _cut(error.grpc_message)
            trailers = _grpc_trailers(error, message)
        else:
            message = _cut(error.message)
            metadata = dict(context.invocation_metadata() or ())
            trailers = _rest_trailers(error, message, error_format(path, metadata))
        if (record := current_record()) is not None:
            trailers = (*trailers, (REQUEST_ID_HEADER, record.request_id))
        await context.abort(error.kind.grpc_code, message, trailers)

    @contextmanager
    def _counted(
        self,
        method: str,
        path: str | None,
        key_name: str | None,
        context: aio.ServicerContext[Any, Any],
        record: CallRecord,
    ) -> Any:
        span = self._span(method, context, record, path)
        self._metrics.calls.begun(method)
        cancelled = False
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            cancelled = True
            raise
        finally:
            code = "CANCELLED" if cancelled else _code_name(context.code())
            if cancelled:
                record.fail(CANCELLED)
            seconds = time.monotonic() - record.began
            self._metrics.calls.ended(method, code, seconds, key_name)
            if span is not None:
                span.end(code, _code_number(code))
            if self._access_log and method not in _QUIET:
                log_access(record, method, path or method, code, seconds)

    def _span(
        self,
        method: str,
        context: aio.ServicerContext[Any, Any],
        record: CallRecord,
        path: str | None,
    ) -> CallSpan | None:
        """Begins the span of a call that is to have one."""
        if self._tracer is None or method in _QUIET:
            return None
        metadata = context.invocation_metadata() or ()
        return self._tracer.begin(
            method, metadata, record, from_gateway=self._from_gateway, path=path
        )


def _raising(error: ServiceError) -> Callable[..., Awaitable[Any]]:
    """A handler that only fails."""

    async def fail(_: object, __: object) -> Any:
        raise error

    return fail


def _code_name(code: Any) -> str:
    """The name of a status code, which grpc.aio gives as a number, or as None before the end."""
    if code is None or code == 0:
        return "OK"
    if isinstance(code, grpc.StatusCode):
        return str(code.name)
    return next((item.name for item in grpc.StatusCode if item.value[0] == code), str(code))


def _code_number(name: str) -> int:
    """The number of a status code."""
    code = grpc.StatusCode.__members__.get(name, grpc.StatusCode.UNKNOWN)
    return int(code.value[0])


def _cut(message: str) -> str:
    """Shortens a message so that it fits into the trailers: JSON may escape one byte as six."""
    raw = message.encode(errors="replace")
    if len(raw) <= _MAX_MESSAGE_BYTES:
        return message
    return raw[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "…"


def _text(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) else None


def _rest_trailers(error: ServiceError, message: str, form: ErrorFormat) -> Trailers:
    """Status and body of the reply, which the gateway makes of them."""
    # json.dumps, because it escapes everything that is not ASCII: the body is sent in a header.
    body = error_body(error, message, form)
    return (
        ("x-http-status", str(error.kind.http_status)),
        ("x-error-body", json.dumps(body, separators=(",", ":"))),
        *_retry_after(error),
    )


def _grpc_trailers(error: ServiceError, message: str) -> Trailers:
    """Rich details."""
    details = ("grpc-status-details-bin", _status(error, message).SerializeToString())
    return (*_retry_after(error), details)


def _retry_after(error: ServiceError) -> Trailers:
    if error.kind is not ErrorKind.OVERLOADED:
        return ()
    return (("retry-after", str(error.retry_after_s or _RETRY_S)),)


def _status(error: ServiceError, message: str) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(
        reason=error.kind.name, domain=SERVICE, metadata={"error_type": error.kind.error_type}
    )
    details = [info]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.kind is ErrorKind.OVERLOADED:
        delay = duration_pb2.Duration(seconds=error.retry_after_s or _RETRY_S)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.kind.grpc_code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
