"""Wraps every call: counts it, and turns exceptions into statuses.

No other module turns exceptions into gRPC statuses. An exception that is no `ServiceError` becomes
INTERNAL and is logged; its text is not sent to the caller.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from ..errors import ErrorKind, ServiceError
from ..generation.metrics import Metrics

logger = logging.getLogger(__name__)

_DOMAIN = "tokenwire"
_RETRY_S = 1
# The trailers contain a message three times, escaped; peers refuse trailers above 8 to 16 KiB.
_MAX_MESSAGE_BYTES = 512


class CallInterceptor(aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler of the server."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

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
        if handler.unary_unary is not None:
            return handler._replace(unary_unary=self._unary(handler.unary_unary, method))
        if inspect.isasyncgenfunction(handler.unary_stream):
            return handler._replace(unary_stream=self._stream(handler.unary_stream, method))
        return handler  # reflection and health watching, which raise no ServiceError

    def _unary(self, function: Any, method: str) -> Any:
        async def call(request: bytes, context: aio.ServicerContext[Any, Any]) -> Any:
            with self._counted(method, context):
                try:
                    return await function(request, context)
                except Exception as error:
                    await _abort(context, error)

        return call

    def _stream(self, function: Any, method: str) -> Any:
        async def call(
            request: bytes, context: aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            replies = function(request, context)
            with self._counted(method, context):
                try:
                    async for reply in replies:
                        yield reply
                except Exception as error:
                    await _abort(context, error)
                finally:
                    await replies.aclose()

        return call

    @contextmanager
    def _counted(self, method: str, context: aio.ServicerContext[Any, Any]) -> Any:
        started = time.monotonic()
        self._metrics.call_begun(method)
        cancelled = False
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            cancelled = True
            raise
        finally:
            code = "CANCELLED" if cancelled else _code_name(context.code())
            self._metrics.call_ended(method, code, time.monotonic() - started)


def _code_name(code: Any) -> str:
    """The name of a status code, which grpc.aio gives as a number, or as None before the end."""
    if code is None or code == 0:
        return "OK"
    if isinstance(code, grpc.StatusCode):
        return str(code.name)
    return next((item.name for item in grpc.StatusCode if item.value[0] == code), str(code))


async def _abort(context: aio.ServicerContext[Any, Any], error: Exception) -> None:
    """Ends a call with the status of an error.

    Raises:
        aio.AbortError: always; that is how grpc.aio ends a call.
    """
    if isinstance(error, aio.AbortError):
        raise error
    if not isinstance(error, ServiceError):
        logger.error("a call failed unexpectedly", exc_info=error)
        error = ServiceError(ErrorKind.INTERNAL, "Internal server error")
    message = _cut(error.message)
    await context.abort(error.kind.grpc_code, message, _trailers(error, message))


def _cut(message: str) -> str:
    """Shortens a message so that it fits into the trailers: JSON may escape one byte as six."""
    raw = message.encode(errors="replace")
    if len(raw) <= _MAX_MESSAGE_BYTES:
        return message
    return raw[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "…"


def _trailers(error: ServiceError, message: str) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata: status and body of the reply for REST, rich details for gRPC."""
    # json.dumps, because it escapes everything that is not ASCII: the body is sent in a header.
    body = {"error": message, "error_type": error.kind.error_type}
    return (
        ("x-http-status", str(error.kind.http_status)),
        ("x-error-body", json.dumps(body, separators=(",", ":"))),
        *((("retry-after", str(_RETRY_S)),) if error.kind is ErrorKind.OVERLOADED else ()),
        ("grpc-status-details-bin", _status(error, message).SerializeToString()),
    )


def _status(error: ServiceError, message: str) -> status_pb2.Status:
    details = [error_details_pb2.ErrorInfo(reason=error.kind.error_type, domain=_DOMAIN)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.kind is ErrorKind.OVERLOADED:
        delay = duration_pb2.Duration(seconds=_RETRY_S)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.kind.grpc_code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
