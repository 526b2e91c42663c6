"""A gRPC client without generated code: it asks the server for its descriptors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.e2e.stack import DEADLINE_S, SERVICE

SHAPE = "Failed to deserialize the JSON body into the target type: "


class ReflectionClient:
    """Calls methods by name, with requests as dicts in protobuf's JSON form.

    Args:
        channel: the connection to use; the caller closes it.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(self._database)

    def services(self) -> list[str]:
        """The full names of all services."""
        return sorted(self._database.get_services())

    def describe(self, service: str = SERVICE) -> ServiceDescriptor:
        """The descriptor of a service, which leads to its methods and their messages."""
        return self._pool.FindServiceByName(service)

    def request(self, method: str, fields: dict[str, Any], service: str = SERVICE) -> Message:
        """Makes the request message of a method; a format may have its type as REST spells it."""
        input_type = self._method(method, service).input_type
        if "type" in (wanted := fields.get("response_format") or {}):
            wanted = {**wanted, "type": f"TYPE_{wanted['type'].upper()}"}
            fields = {**fields, "response_format": wanted}
        return json_format.ParseDict(fields, message_factory.GetMessageClass(input_type)())

    def call(
        self,
        method: str,
        fields: dict[str, Any] | None = None,
        *,
        service: str = SERVICE,
        timeout: float = DEADLINE_S,
        metadata: dict[str, str] | None = None,
    ) -> Any:
        """The reply of a unary method, or the running call of a streaming one."""
        descriptor = self._method(method, service)
        path = f"/{service}/{method}"
        request = self.request(method, fields or {}, service)
        output = message_factory.GetMessageClass(descriptor.output_type)
        kind = (
            self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        )
        stub = kind(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=output.FromString,
        )
        return stub(request, timeout=timeout, metadata=list((metadata or {}).items()))

    def collect(self, method: str, fields: dict[str, Any], **options: Any) -> list[Any]:
        """All messages of a stream."""
        return list(self.call(method, fields, **options))

    def _method(self, name: str, service: str) -> MethodDescriptor:
        return self.describe(service).methods_by_name[name]


def as_dict(message: Message) -> dict[str, Any]:
    """A message as plain values, with the names of the .proto files."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def details(error: grpc.RpcError) -> tuple[str, str | None]:
    """REST's `error_type` in google.rpc.ErrorInfo, and the field of BadRequest, in a failure."""
    error_type, field = "", None
    for detail in _details(error):
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            assert info.domain == SERVICE
            assert re.fullmatch("[A-Z_]+", info.reason)
            error_type = info.metadata["error_type"]
        elif detail.Unpack(bad):
            (violation,) = bad.field_violations
            assert violation.description == error.details()
            field = violation.field
    return error_type, field


def assert_same_text(error: grpc.RpcError, rest: str) -> None:
    """Both callers get the same text, but for the shape of a request: each has its own words."""
    if rest.startswith(SHAPE):
        assert error.details()
        assert "JSON" not in str(error.details())
    else:
        assert error.details() == rest


def retry_seconds(error: grpc.RpcError) -> int | None:
    """The delay of google.rpc.RetryInfo in a failure."""
    for detail in _details(error):
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return int(retry.retry_delay.seconds)
    return None


def _details(error: grpc.RpcError) -> Iterator[Any]:
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    yield from status.details
