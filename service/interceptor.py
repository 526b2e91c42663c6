"""The edge of every call: counts it, and turns what was raised into a status.

The only place where exceptions become gRPC statuses. What was not raised on purpose ends as
INTERNAL and is logged; its text does not leave the server.
"""

from __future__ import annotations

import asyncio
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

from .errors import ErrorKind, ServiceError
from .metrics import Metrics

logger = logging.getLogger(__name__)

_DOMAIN = "tokenwire"
_RETRY_S = 1
_MAX_BODY_BYTES = 4096  # Envoy answers 502 to much larger headers


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
        if handler.unary_stream is not None:
            return handler._replace(unary_stream=self._stream(handler.unary_stream, method))
        return handler  # reflection, which streams both ways, needs none of this

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
    """A status code's name; grpc.aio knows it as a number, or not yet at all."""
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
    await context.abort(error.kind.grpc_code, error.message, _trailers(error))


def _trailers(error: ServiceError) -> tuple[tuple[str, str | bytes], ...]:
    """For REST the status and the body, for gRPC the details."""
    return (
        ("x-http-status", str(error.kind.http_status)),
        ("x-error-body", _body(error)),
        *((("retry-after", str(_RETRY_S)),) if error.kind is ErrorKind.OVERLOADED else ()),
        ("grpc-status-details-bin", _status(error).SerializeToString()),
    )


def _body(error: ServiceError) -> str:
    """ASCII JSON, since it travels as a header."""
    body = {"error": error.message, "error_type": error.kind.error_type}
    text = json.dumps(body, separators=(",", ":"))
    if len(text) > _MAX_BODY_BYTES:
        body["error"] = (
            error.message[: _MAX_BODY_BYTES // 8] + "…"
        )  # \uXXXX takes six per character
        text = json.dumps(body, separators=(",", ":"))
    return text


def _status(error: ServiceError) -> status_pb2.Status:
    details = [error_details_pb2.ErrorInfo(reason=error.kind.error_type, domain=_DOMAIN)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.kind is ErrorKind.OVERLOADED:
        delay = duration_pb2.Duration(seconds=_RETRY_S)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.kind.grpc_code.value[0], message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
