"""Standard services beside the API: reflection and health."""

from __future__ import annotations

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.reflection_client import ReflectionClient, as_dict
from tests.e2e.stack import DEADLINE_S, SERVICE


def test_reflection_lists_the_services(api: ReflectionClient) -> None:
    assert api.services() == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    ]


def test_reflection_describes_every_method(api: ReflectionClient) -> None:
    methods = {
        method.name: (method.input_type.name, method.output_type.name, method.server_streaming)
        for method in api.describe().methods
    }
    assert methods == {
        "Generate": ("GenerateRequest", "GenerateResponse", False),
        "GenerateStream": ("GenerateRequest", "GenerateStreamResponse", True),
        "Abort": ("AbortRequest", "AbortResponse", False),
        "CompatGenerate": ("CompatGenerateRequest", "CompatGenerateResponse", True),
        "Chat": ("ChatRequest", "ChatResponse", True),
        "ChatUnary": ("ChatRequest", "ChatCompletion", False),
        "Completions": ("CompletionsRequest", "CompletionsResponse", True),
        "CompletionsUnary": ("CompletionsRequest", "Completion", False),
        "Responses": ("ResponsesRequest", "ResponsesResponse", True),
        "Invocations": ("InvocationsRequest", "InvocationsResponse", True),
        "Tokenize": ("TokenizeRequest", "TokenizeResponse", False),
        "TokenizeStream": ("TokenizeRequest", "TokenizeResponse", True),
        "ChatTokenize": ("ChatRequest", "ChatTokenizeResponse", False),
        "ChatTokenizeStream": ("ChatRequest", "ChatTokenizeResponse", True),
        "Info": ("InfoRequest", "InfoResponse", False),
        "GetLoad": ("GetLoadRequest", "GetLoadResponse", False),
        "WatchLoad": ("WatchLoadRequest", "GetLoadResponse", True),
        "GetModel": ("GetModelRequest", "GetModelResponse", False),
        "ListModels": ("ListModelsRequest", "ListModelsResponse", False),
        "Health": ("HealthRequest", "HealthResponse", False),
        "LoadAdapter": ("LoadAdapterRequest", "LoadAdapterResponse", False),
        "UnloadAdapter": ("UnloadAdapterRequest", "UnloadAdapterResponse", False),
        "ListAdapters": ("ListAdaptersRequest", "ListAdaptersResponse", False),
        "Metrics": ("MetricsRequest", "HttpBody", False),
        "OpenApi": ("OpenApiRequest", "HttpBody", False),
        "Docs": ("DocsRequest", "HttpBody", False),
    }


@pytest.mark.parametrize("service", ["", SERVICE])
def test_standard_health_service_serves(api: ReflectionClient, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    reply = health_pb2_grpc.HealthStub(api.channel).Check(request, timeout=DEADLINE_S)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_standard_health_service_can_be_watched(api: ReflectionClient) -> None:
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    call = health_pb2_grpc.HealthStub(api.channel).Watch(request, timeout=DEADLINE_S)
    assert next(call).status == health_pb2.HealthCheckResponse.SERVING
    call.cancel()


def test_health_is_an_empty_message(api: ReflectionClient) -> None:
    assert as_dict(api.call("Health")) == {}
