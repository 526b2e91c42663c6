"""The errors that a caller can get, in one table with the gRPC code and REST status of each.

`ServiceError(kind, message)` is raised anywhere in the service. `api/interceptor.py` turns it into
the status of a call; `codec/presenter.py` turns it into an event inside a REST stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

from grpc import StatusCode

_MAX_QUOTED = 256  # characters of a caller's name that an error repeats


class _Row(NamedTuple):
    error_type: str
    http_status: int
    grpc_code: StatusCode
    prefix: str = ""


class ErrorKind(Enum):
    """One row per kind of error: `error_type`, REST status, gRPC code, TGI's prefix of texts."""

    VALIDATION = _Row("validation", 422, StatusCode.INVALID_ARGUMENT, "Input validation error: ")
    JSON = _Row(
        "validation",
        400,
        StatusCode.INVALID_ARGUMENT,
        "Failed to parse the request body as JSON: ",
    )
    SHAPE = _Row(
        "validation",
        422,
        StatusCode.INVALID_ARGUMENT,
        "Failed to deserialize the JSON body into the target type: ",
    )
    TEMPLATE = _Row("template_error", 422, StatusCode.INVALID_ARGUMENT, "Template error: ")
    TOOL = _Row("tool_error", 422, StatusCode.INVALID_ARGUMENT, "Tool error: ")
    SUFFIX = _Row("suffix not supported", 422, StatusCode.INVALID_ARGUMENT)
    BATCH_SIZE = _Row("batch size exceeded", 422, StatusCode.INVALID_ARGUMENT)
    OVERLOADED = _Row("overloaded", 429, StatusCode.RESOURCE_EXHAUSTED)
    CANCELLED = _Row("cancelled", 499, StatusCode.CANCELLED)
    GENERATION = _Row("generation", 424, StatusCode.ABORTED, "Request failed during generation: ")
    INCOMPLETE = _Row("incomplete_generation", 500, StatusCode.INTERNAL)
    INTERNAL = _Row("internal", 500, StatusCode.INTERNAL)
    UNHEALTHY = _Row("healthcheck", 503, StatusCode.UNAVAILABLE)
    SLOW_READER = _Row("slow_reader", 408, StatusCode.DEADLINE_EXCEEDED)
    NOT_FOUND = _Row("not_found", 404, StatusCode.NOT_FOUND)
    ADAPTER = _Row("adapter", 400, StatusCode.INVALID_ARGUMENT)
    ADAPTER_LOADED = _Row("adapter_loaded", 400, StatusCode.ALREADY_EXISTS)
    TOO_MANY_ADAPTERS = _Row("too_many_adapters", 400, StatusCode.FAILED_PRECONDITION)
    FORBIDDEN = _Row("forbidden", 403, StatusCode.PERMISSION_DENIED)
    UNAUTHENTICATED = _Row("unauthenticated", 401, StatusCode.UNAUTHENTICATED)

    @property
    def error_type(self) -> str:
        """The `error_type` of REST and the reason of `google.rpc.ErrorInfo`."""
        return self.value.error_type

    @property
    def http_status(self) -> int:
        """The REST status."""
        return self.value.http_status

    @property
    def grpc_code(self) -> StatusCode:
        """The gRPC code."""
        return self.value.grpc_code


class ServiceError(Exception):
    """An error that is reported to the caller.

    Args:
        kind: the row of the table.
        message: what is wrong, without the kind's prefix.
        field: the path of the field at fault in the request, if it is a single one.
        retry_after_s: when to try again, where the server is full and can tell.
        code: OpenAI's name of the error, which its clients look for, where it has one of its own.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(kind.value.prefix + message)
        self.kind = kind
        self.reason = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.code = code

    @property
    def message(self) -> str:
        """The whole text, as REST callers get it."""
        return str(self)

    @property
    def grpc_message(self) -> str:
        """The text for gRPC callers, to whom a JSON body means nothing."""
        return self.reason if self.kind in (ErrorKind.JSON, ErrorKind.SHAPE) else str(self)

    def rename_field(self, names: Mapping[str, str]) -> None:
        """Replaces the field's name in `/generate` by its name in another endpoint.

        A field of `parameters` that `names` lacks keeps its name without the prefix `parameters.`:
        the other endpoints have these fields in the request itself.
        """
        if self.field is not None:
            self.field = names.get(self.field, self.field.removeprefix("parameters."))


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Renames the fields of errors in the block from `/generate`'s names to an endpoint's own."""
    try:
        yield
    except ServiceError as error:
        error.rename_field(names)
        raise


def internal() -> ServiceError:
    """A defect of the server, of which callers learn nothing."""
    return ServiceError(ErrorKind.INTERNAL, "Internal server error")


def overloaded(why: str = "", *, retry_after_s: int | None = None) -> ServiceError:
    """The error for a request that the server has no capacity for; `why` adds to TGI's text."""
    text = f"Model is overloaded: {why}" if why else "Model is overloaded"
    return ServiceError(ErrorKind.OVERLOADED, text, retry_after_s=retry_after_s)


def slow_reader(limit_s: float) -> ServiceError:
    """The caller does not read its stream."""
    return ServiceError(
        ErrorKind.SLOW_READER, f"the stream was not read for more than {limit_s:g} s"
    )


def cancelled() -> ServiceError:
    """The error of a call that someone ended by its id."""
    return ServiceError(ErrorKind.CANCELLED, "the call was ended by Abort")


def unhealthy() -> ServiceError:
    """The error for a server without a working engine, or one that is shutting down."""
    return ServiceError(ErrorKind.UNHEALTHY, "unhealthy")


def unanswered() -> ServiceError:
    """The error for a call to end that may be in a service process which does not answer."""
    return ServiceError(
        ErrorKind.UNHEALTHY, "a service process does not answer: the call may run there"
    )


def unknown_model(name: str) -> ServiceError:
    """The error for a model that is not served."""
    text = f"The model `{_quoted(name)}` does not exist"
    return ServiceError(ErrorKind.NOT_FOUND, text, field="id", code="model_not_found")


def unknown_adapter(name: str) -> ServiceError:
    """The error for a request that names an adapter that is not served."""
    text = f"The adapter `{_quoted(name)}` does not exist"
    return ServiceError(
        ErrorKind.NOT_FOUND, text, field="parameters.adapter_id", code="model_not_found"
    )


def _quoted(name: str) -> str:
    """A caller's name as messages repeat it: in one line, and no longer than they may be."""
    shown = name[:_MAX_QUOTED]
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown
    )


def unauthenticated(*, is_missing: bool) -> ServiceError:
    """The error for a call without an API key, or with a wrong one."""
    text = "an API key is needed: `authorization: Bearer KEY`" if is_missing else "wrong API key"
    return ServiceError(ErrorKind.UNAUTHENTICATED, text)


def forbidden(why: str) -> ServiceError:
    """The error for a caller, or a server, that may not do this."""
    return ServiceError(ErrorKind.FORBIDDEN, why)


def missing_field(field: str) -> ServiceError:
    """The error for a required field that is absent; `field` is its path."""
    path, _, name = field.rpartition(".")
    where = f"{path}: " if path else ""
    return ServiceError(ErrorKind.SHAPE, f"{where}missing field `{name}`", field=field)
