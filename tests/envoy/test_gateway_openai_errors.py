"""Errors that Envoy makes itself, for callers who read OpenAI's form of them."""

from __future__ import annotations

import json
import socket
from typing import Any

import grpc
import httpx
import pytest

from service.launch.gateway import GATEWAY_ERRORS
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway

JSON = {"content-type": "application/json"}
UNHEALTHY = b'{"error":"unhealthy","error_type":"healthcheck"}'
SDK = {"x-stainless-lang": "python"}
OPENAI_FORMS = [SDK, {"x-error-format": "openai"}, {"x-error-format": "openai", **SDK}]
TGI_FORMS = [{}, {"x-error-format": "tgi", **SDK}, {"x-error-format": "", **SDK}]


def openai_error(reply: httpx.Response) -> dict[str, Any]:
    """The error object of a reply, whose keys are OpenAI's."""
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] is None
    return error


@pytest.mark.parametrize("headers", OPENAI_FORMS)
def test_errors_of_envoy_have_openais_form_for_who_reads_it(
    gateway: Gateway, headers: dict[str, str]
) -> None:
    client, path = gateway.client, "/v1/chat/completions"
    typed = {**JSON, **headers}
    replies = {
        404: client.get("/v1/embeddings", headers=headers),
        405: client.put(path, headers=headers),
        413: client.post(path, content=b"x" * 2_097_153, headers=typed),
        415: client.post(path, content=b"x", headers={"content-type": "text/plain", **headers}),
        431: client.get("/v1/models", headers={**headers, **{f"x-{i}": "" for i in range(300)}}),
    }
    for status, reply in replies.items():
        text, error_type = GATEWAY_ERRORS[status]
        assert reply.status_code == status
        error = openai_error(reply)
        assert (error["message"], error["code"]) == (text, error_type)
        assert error["type"] == "invalid_request_error"
    gateway.service.fail("Chat", grpc.StatusCode.UNAVAILABLE, "")
    assert openai_error(client.post(path, json={}, headers=headers)) == {
        "message": "unhealthy",
        "type": "server_error",
        "param": None,
        "code": "healthcheck",
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("GET", "/v1/responses/resp_1/input_items?limit=2"),
        ("POST", "/v1/responses/resp_1/cancel"),
    ],
)
def test_responses_are_said_not_to_be_stored(gateway: Gateway, method: str, path: str) -> None:
    reply = gateway.client.request(method, path, headers=SDK)
    assert reply.status_code == 404
    error = openai_error(reply)
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")
    assert error["message"].startswith("Responses are not stored: ")
    reply = gateway.client.request(method, path)
    assert reply.status_code == 404
    assert reply.json() == {"error": error["message"], "error_type": "not_found"}


@pytest.mark.parametrize("headers", TGI_FORMS)
def test_errors_of_envoy_have_tgis_form_for_others(
    gateway: Gateway, headers: dict[str, str]
) -> None:
    expected = b'{"error":"Not Found","error_type":"not_found"}'
    assert gateway.client.get("/v1/embeddings", headers=headers).content == expected
    gateway.service.fail("Chat", grpc.StatusCode.UNAVAILABLE, "")
    reply = gateway.client.post("/v1/chat/completions", json={}, headers=headers)
    assert reply.content == UNHEALTHY


@pytest.mark.parametrize("headers", OPENAI_FORMS)
def test_paths_of_tgi_have_tgis_errors_for_everybody(
    gateway: Gateway, headers: dict[str, str]
) -> None:
    expected = b'{"error":"Not Found","error_type":"not_found"}'
    for path in ("/nope", "/v10", "/generate/v1/x"):
        assert gateway.client.get(path, headers=headers).content == expected
    forged = {"x-envoy-original-path": "/v1/x", **headers}
    assert gateway.client.get("/nope", headers=forged).content == expected
    gateway.service.fail("Generate", grpc.StatusCode.UNAVAILABLE, "")
    assert gateway.client.post("/generate", json={}, headers=headers).content == UNHEALTHY


def test_broken_http_is_answered_in_openais_form_too(gateway: Gateway) -> None:
    host, _, port = gateway.target.partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nx-stainless-lang: go\r\n\r\n")
        with connection.makefile("rb") as reply:
            head, _, body = reply.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["message"] == "missing_host_header"
