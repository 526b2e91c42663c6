"""Which form an error has for whom, and OpenAI's form of it."""

from __future__ import annotations

import pytest

from service.error_bodies import error_format, openai_body

SDK = {"x-stainless-lang": "js"}
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "headers", "form"),
    [
        (CHAT, {}, "tgi"),
        (CHAT, {"user-agent": "openai"}, "tgi"),
        (CHAT, SDK, "openai"),
        ("/v1/models/a", {"x-stainless-runtime": "go"}, "openai"),
        ("/v1/completions", {"x-error-format": "openai"}, "openai"),
        ("/v1/completions", {"x-error-format": "tgi", **SDK}, "tgi"),
        ("/v1/completions", {"x-error-format": "OPENAI"}, "tgi"),
        ("/generate", SDK, "tgi"),
        ("/v10", SDK, "tgi"),
        (None, SDK, "tgi"),
    ],
)
def test_path_and_headers_decide(path: str | None, headers: dict[str, str], form: str) -> None:
    assert error_format(path, headers) == form


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "invalid_request_error"),
        (404, "invalid_request_error"),
        (422, "invalid_request_error"),
        (424, "server_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_type_says_whose_fault_it_is(status: int, kind: str) -> None:
    assert openai_body("x", "y", status)["error"]["type"] == kind


def test_code_is_openais_where_it_has_one() -> None:
    assert openai_body("x", "overloaded", 429)["error"]["code"] == "rate_limit_exceeded"
    assert openai_body("x", "unauthenticated", 401)["error"]["code"] == "invalid_api_key"
    assert openai_body("x", "validation", 422)["error"]["code"] == "validation"
    assert openai_body("x", "validation", 422, code="z")["error"]["code"] == "z"
