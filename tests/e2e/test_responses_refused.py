"""What POST /v1/responses refuses: stored state, other tools, and values out of bounds, by name."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.stack import PROMPT, Stack

PATH = "/v1/responses"
USER = {"role": "user", "content": "x"}
FUNCTION = {"type": "function", "name": "f", "parameters": {}}
IMAGE = {"type": "input_image", "image_url": "https://example.com/x.png"}
FILE = {"type": "input_file", "file_id": "file_1"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
REFERENCE = {"type": "item_reference", "id": "msg_1"}


def message(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def without(item: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != name}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
    ({"conversation": "conv_1"}, "conversation", "nothing is stored"),
    ({"conversation": {"id": "conv_1"}}, "conversation", "nothing is stored"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "no stored prompts"),
    ({"background": True}, "background", "must not be true"),
    ({"truncation": "auto"}, "truncation", "must be `disabled`"),
    ({"include": ["everything"]}, "include[0]", "message.output_text.logprobs"),
    ({"input": [USER, REFERENCE]}, "input[1]", "nothing is stored"),
    ({"input": [{"id": "msg_1"}]}, "input[0]", "nothing is stored"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", "web_search_call"),
    ({"input": []}, "input", "at least one"),
    ({"input": ["x"]}, "input[0]", "expected an object"),
    ({"input": [message(IMAGE)]}, "input[0].content[0].image_url", "text only"),
    ({"input": [message(IMAGE, role="assistant")]}, "input[0].content", "shows no images"),
    ({"input": [USER, message(FILE)]}, "input[1].content[0]", "`input_file` is not supported"),
    ({"input": [message({"type": "text", "text": "x"})]}, "input[0].content[0].type", "input_text"),
    ({"input": [message({"type": "input_text"})]}, "input[0].content[0].text", "missing field"),
    ({"input": [message("x")]}, "input[0].content[0]", "expected an object"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing field"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "Given: tool"),
    ({"input": [without(CALL, "call_id")]}, "input[0].call_id", "missing field"),
    ({"input": [without(CALL, "arguments")]}, "input[0].arguments", "missing field"),
    ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments", "expected a string"),
    (
        {"input": [CALL, {"type": "function_call_output", "call_id": "c", "output": [IMAGE]}]},
        "input[1].output[0].image_url",
        "text only",
    ),
    *(
        ({"tools": [FUNCTION, {"type": kind}]}, "tools[1].type", kind)
        for kind in (
            "web_search", "web_search_preview", "file_search", "code_interpreter", "mcp",
            "computer_use_preview", "image_generation", "local_shell", "custom",
        )
    ),
    ({"tools": [without(FUNCTION, "name")]}, "tools[0].name", "missing field"),
    ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name", "two tools have the name f"),
    ({"tools": [{**FUNCTION, "parameters": {"anyOf": []}}]}, "tools[0].parameters", "properties"),
    ({"tools": [FUNCTION], "tool_choice": "f"}, "tool_choice", "must be `auto`"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "web_search"}}, "tool_choice", "must be `auto`"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function"}}, "tool_choice.name", "missing"),
    (
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice",
        "Tool with name g not found",
    ),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "json_schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}},
        "text.format",
        "grammar is not valid",
    ),
    ({"reasoning": {"effort": ""}}, "reasoning.effort", "`reasoning.effort` must have"),
    ({"max_output_tokens": 0}, "max_output_tokens", "`max_output_tokens` must be strictly"),
    ({"max_output_tokens": 5000}, "max_output_tokens", "`input` tokens + `max_output_tokens`"),
    ({"top_logprobs": 6}, "top_logprobs", "`top_logprobs` must be >= 0 and <= 5. Given: 6"),
    ({"temperature": -0.5}, "temperature", "strictly positive"),
    ({"top_p": 1.5}, "top_p", "`top_p` must be"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "up to 16 entries"),
    ({"metadata": {"a": "x" * 513}}, "metadata", "512 characters"),
    ({"input": "word " * 20_000}, "input", "`input` must have"),
    ({"input": [USER] * 4097}, "input", "Given: 4097"),
    ({"input": 5}, "input", "expected a string or a list"),
    ({"metadata": {"a": 1}}, "metadata[...]", "expected a string"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "text"), REFUSED)
def test_refused_by_name(stack: Stack, fields: dict[str, Any], param: str, text: str) -> None:
    body = {"input": PROMPT, "max_output_tokens": 1, **fields}
    reply = stack.http.post(PATH, json=body, headers={"x-error-format": "openai"})
    assert reply.status_code == 422, reply.text
    error = reply.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert text in error["message"]
    plain = stack.http.post(PATH, json=body).json()
    assert plain["error"] == error["message"]
    assert set(plain) == {"error", "error_type"}


ACCEPTED: list[dict[str, Any]] = [
    {"store": True},
    {"store": False, "include": ["reasoning.encrypted_content"]},
    {"background": False, "previous_response_id": None, "conversation": None, "prompt": None},
    {"truncation": "disabled", "user": "u", "safety_identifier": "s", "prompt_cache_key": "k"},
    {"service_tier": "auto", "text": {"verbosity": "low", "format": {"type": "text"}}},
    {"top_p": 1.0, "temperature": 1.0, "parallel_tool_calls": True, "tool_choice": "auto"},
    {"stream_options": {"include_obfuscation": True}, "max_tool_calls": 3, "tools": []},
    {"tools": [{**FUNCTION, "strict": None, "description": None}], "unknown": [1]},
    {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER]},
    {"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}, USER]},
    {"input": [USER, CALL, {"type": "function_call_output", "call_id": "c",
                            "output": [{"type": "input_text", "text": "1"}]}]},
]  # fmt: skip


@pytest.mark.parametrize("fields", ACCEPTED)
def test_what_clients_send_besides_is_accepted(stack: Stack, fields: dict[str, Any]) -> None:
    reply = stack.http.post(PATH, json={"input": PROMPT, "max_output_tokens": 1, **fields})
    assert reply.status_code == 200, reply.text
    for name in ("user", "safety_identifier", "prompt_cache_key", "max_tool_calls", "top_p"):
        if name in fields:
            assert reply.json()[name] == fields[name]


def test_sdk_raises_for_stored_state(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="-", max_retries=0) as sdk:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            sdk.responses.create(model="m", input=PROMPT, previous_response_id="resp_1")
        assert refused.value.param == "previous_response_id"
        for ask in (sdk.responses.retrieve, sdk.responses.delete):
            with pytest.raises(openai.NotFoundError):
                ask("resp_1")
