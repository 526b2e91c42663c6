"""Server reflection, by both of its names: v1, which tools ask for first, and v1alpha.

grpcio-reflection has v1alpha only. The messages of both are the same on the wire, so v1 is the same
servicer, and its descriptors are v1alpha's with the other package name.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

V1 = "grpc.reflection.v1.ServerReflection"
V1ALPHA: str = reflection.SERVICE_NAME

_ALPHA_PACKAGE, _PACKAGE = "grpc.reflection.v1alpha", "grpc.reflection.v1"


def add_reflection(server: aio.Server, pool: DescriptorPool, services: Iterable[str]) -> None:
    """Lets clients ask a server what it serves.

    Args:
        server: the server.
        pool: has the services' descriptors; those of health and reflection are added to it.
        services: names that are listed beside the reflection's own.
    """
    for module in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    pool.Add(_v1_descriptor())
    servicer = reflection.aio.ReflectionServicer((*services, V1, V1ALPHA), pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def _v1_descriptor() -> descriptor_pb2.FileDescriptorProto:
    text = reflection_pb2.DESCRIPTOR.serialized_pb
    file = descriptor_pb2.FileDescriptorProto.FromString(text)
    file.name = "grpc/reflection/v1/reflection.proto"
    file.package = _PACKAGE
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(_ALPHA_PACKAGE, _PACKAGE)
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(_ALPHA_PACKAGE, _PACKAGE)
        method.output_type = method.output_type.replace(_ALPHA_PACKAGE, _PACKAGE)
    return file
