"""What a call can fail with: one class per gRPC code that callers treat in a way of its own."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2


class TokenwireError(Exception):
    """A call that failed.

    Attributes:
        code: the gRPC code.
        message: what is wrong.
        error_type: the kind of error, as the server's REST interface names it; None if the server
            said nothing.
        field: the field of the request that is at fault, if it is a single one.
        retry_delay_s: after how many seconds to try again, if the server said so.
        request_id: the name of the call in the server's log, if the server has seen it.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        error_type: str | None = None,
        field: str | None = None,
        retry_delay_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.error_type = error_type
        self.field = field
        self.retry_delay_s = retry_delay_s
        self.request_id = request_id


class InvalidRequestError(TokenwireError):
    """The request breaks a limit or has the wrong shape."""


class UnauthenticatedError(TokenwireError):
    """The server asks for an API key, and the call had none or a wrong one."""


class OverloadedError(TokenwireError):
    """The server is full."""


class CallCancelledError(TokenwireError):
    """Someone ended the call by its id, or the caller itself did."""


class GenerationError(TokenwireError):
    """Generation failed after it had begun."""


class UnavailableError(TokenwireError):
    """The server cannot be reached, is not ready, or is shutting down."""


class DeadlineExceededError(TokenwireError):
    """The answer took too long, or a stream was not read for too long."""


_CLASSES: dict[grpc.StatusCode, type[TokenwireError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.ABORTED: GenerationError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
}


def error_of(failed: grpc.RpcError) -> TokenwireError:
    """The error that a failed call is."""
    code = failed.code()
    trailers = dict(failed.trailing_metadata() or ())
    known = _details(trailers.get("grpc-status-details-bin", b""))
    kind = _CLASSES.get(code, TokenwireError)
    return kind(code, failed.details() or "", request_id=trailers.get("x-request-id"), **known)


def no_answer() -> TokenwireError:
    """The error for a call that ended well and without its only message."""
    return TokenwireError(grpc.StatusCode.INTERNAL, "the server sent no answer")


def _details(raw: bytes) -> dict[str, Any]:
    """What the details of a status say, by the names of an error's attributes."""
    known: dict[str, Any] = {}
    try:
        status = status_pb2.Status.FromString(raw)
    except DecodeError:  # of a proxy that writes something else there
        return known
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            known["error_type"] = info.metadata.get("error_type", info.reason)
        elif detail.Unpack(bad) and bad.field_violations:
            known["field"] = bad.field_violations[0].field
        elif detail.Unpack(retry):
            known["retry_delay_s"] = retry.retry_delay.ToTimedelta().total_seconds()
    return known
