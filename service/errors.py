"""The errors a caller can get, in one table with both faces: gRPC code and REST status.

ServiceError(kind, message)
    raised anywhere in the service, translated at the edge only (`interceptor.py` for gRPC,
    `render.py` for events inside a stream).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

from grpc import StatusCode


class _Face(NamedTuple):
    error_type: str
    http_status: int
    grpc_code: StatusCode
    prefix: str = ""


class ErrorKind(Enum):
    """One row per kind of error: `error_type`, REST status, gRPC code, and TGI's prefix."""

    VALIDATION = _Face("validation", 422, StatusCode.INVALID_ARGUMENT, "Input validation error: ")
    SHAPE = _Face(
        "validation",
        422,
        StatusCode.INVALID_ARGUMENT,
        "Failed to deserialize the JSON body into the target type: ",
    )
    TEMPLATE = _Face("template_error", 422, StatusCode.INVALID_ARGUMENT, "Template error: ")
    TOOL = _Face("tool_error", 422, StatusCode.INVALID_ARGUMENT, "Tool error: ")
    SUFFIX = _Face("suffix not supported", 422, StatusCode.INVALID_ARGUMENT)
    BATCH_SIZE = _Face("batch size exceeded", 422, StatusCode.INVALID_ARGUMENT)
    GRAMMAR_AND_TOOLS = _Face("grammar and tools", 422, StatusCode.INVALID_ARGUMENT)
    OVERLOADED = _Face("overloaded", 429, StatusCode.RESOURCE_EXHAUSTED)
    GENERATION = _Face("generation", 424, StatusCode.ABORTED, "Request failed during generation: ")
    INCOMPLETE = _Face("incomplete_generation", 500, StatusCode.INTERNAL)
    INTERNAL = _Face("internal", 500, StatusCode.INTERNAL)
    UNHEALTHY = _Face("healthcheck", 503, StatusCode.UNAVAILABLE)
    NOT_FOUND = _Face("not_found", 404, StatusCode.NOT_FOUND)

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
    """An error that its caller shall see.

    Args:
        kind: the row of the table.
        message: what is wrong, without the kind's prefix.
        field: the offending field's path in the request, if it is one field's fault.
    """

    def __init__(self, kind: ErrorKind, message: str, *, field: str | None = None) -> None:
        super().__init__(kind.value.prefix + message)
        self.kind = kind
        self.field = field

    @property
    def message(self) -> str:
        """The whole text."""
        return str(self)

    def rename_field(self, names: Mapping[str, str]) -> None:
        """Calls the field what another endpoint calls it.

        A field of `parameters` that is not among the names is one of the request itself there.
        """
        if self.field is not None:
            self.field = names.get(self.field, self.field.removeprefix("parameters."))


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Within it, errors that name fields of `/generate` name those of another endpoint."""
    try:
        yield
    except ServiceError as error:
        error.rename_field(names)
        raise


def overloaded() -> ServiceError:
    """No permit is free: the request is refused at once."""
    return ServiceError(ErrorKind.OVERLOADED, "Model is overloaded")


def unhealthy() -> ServiceError:
    """The engine is not there, or does not move."""
    return ServiceError(ErrorKind.UNHEALTHY, "unhealthy")


def missing_field(name: str) -> ServiceError:
    """A required field was not sent."""
    return ServiceError(ErrorKind.SHAPE, f"missing field `{name}`", field=name)
