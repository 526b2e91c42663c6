"""What ends a text and what does not, the same over REST and gRPC and on every path."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient, details
from tests.e2e.stack import PROMPT, Stack

ENDS = "My name is Olivier and I"  # the model continues it to the end of a sentence
REST, GRPC = "REST", "gRPC"
FACES = pytest.mark.parametrize("face", [REST, GRPC])


def generate(
    stack: Stack, face: str, inputs: str = PROMPT, **parameters: Any
) -> tuple[list[int], str]:
    """The ids of a generation and why it ended."""
    body = {"inputs": inputs, "parameters": {"details": True, **parameters}}
    if face == REST:
        reply = stack.http.post("/generate", json=body)
        assert reply.status_code == 200, reply.text
        found = reply.json()["details"]
        return [token["id"] for token in found["tokens"]], found["finish_reason"]
    message = ReflectionClient(stack.direct).call("Generate", body)
    reason = type(message.details).DESCRIPTOR.fields_by_name["finish_reason"].enum_type
    name = reason.values_by_number[message.details.finish_reason].name
    return [token.id for token in message.details.tokens], name.removeprefix(
        "FINISH_REASON_"
    ).lower()


@FACES
def test_stop_token_ends_a_text_and_is_its_last(stack: Stack, face: str) -> None:
    ids, _ = generate(stack, face, max_new_tokens=8)
    stop = ids[4]
    end = ids.index(stop) + 1
    found = generate(stack, face, max_new_tokens=8, stop_token_ids=[stop, stop])
    assert found == (ids[:end], "stop_sequence")


@FACES
def test_no_text_ends_before_its_fewest_tokens(stack: Stack, face: str) -> None:
    ids, reason = generate(stack, face, ENDS, max_new_tokens=60)
    assert reason == "eos_token"
    longer, _ = generate(stack, face, ENDS, max_new_tokens=60, min_new_tokens=len(ids) + 2)
    assert longer[: len(ids) - 1] == ids[:-1]
    assert ids[-1] not in longer[: len(ids) + 2]
    same = generate(stack, face, ENDS, max_new_tokens=60, min_new_tokens=len(ids) - 1)
    assert same == (ids, "eos_token")


@FACES
def test_ignored_end_token_is_a_token_like_others(stack: Stack, face: str) -> None:
    ids, _ = generate(stack, face, ENDS, max_new_tokens=60)
    longer, reason = generate(stack, face, ENDS, max_new_tokens=60, ignore_eos=True)
    assert longer[: len(ids)] == ids
    assert (len(longer), reason) == (60, "length")


@FACES
def test_min_p_of_one_leaves_the_likeliest_token_alone(stack: Stack, face: str) -> None:
    greedy, _ = generate(stack, face, max_new_tokens=8)
    hot = {"temperature": 20.0, "seed": 3, "max_new_tokens": 8}
    assert generate(stack, face, **hot)[0] != greedy
    assert generate(stack, face, min_p=1.0, **hot)[0] == greedy


def openai(stack: Stack, path: str, **fields: Any) -> tuple[str, str, int]:
    """The first choice's text, why it ended, and how many tokens it has."""
    prompt = (
        {"messages": [{"role": "user", "content": PROMPT}]}
        if "chat" in path
        else {"prompt": PROMPT}
    )
    body = {"temperature": 0.0, "max_tokens": 8, **prompt, **fields}
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    return text, choice["finish_reason"], reply.json()["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_openai_paths_know_the_same_ends(stack: Stack, path: str) -> None:
    text, _, _ = openai(stack, path)
    last = stack.http.post("/tokenize", json={"inputs": text}).json()[-1]["id"]
    assert openai(stack, path, max_tokens=60, stop_token_ids=[last])[1] == "stop"
    assert openai(stack, path, max_tokens=60, stop=[text[-3:]])[1] == "stop"
    assert openai(stack, path, max_tokens=60, ignore_eos=True)[1:] == ("length", 60)
    assert openai(stack, path, max_tokens=60, min_tokens=60)[1:] == ("length", 60)
    hot = {"temperature": 20.0, "seed": 3}
    assert openai(stack, path, **hot)[0] != text
    assert openai(stack, path, min_p=1.0, **hot)[0] == text


@pytest.mark.parametrize(
    ("path", "fields", "text", "field"),
    [
        ("/generate", {"min_p": 1.5}, "`min_p` must be >= 0.0 and <= 1.0", "parameters.min_p"),
        (
            "/generate",
            {"stop_token_ids": [4294967295]},
            "`stop_token_ids` must be < ",
            "parameters.stop_token_ids",
        ),
        (
            "/generate",
            {"max_new_tokens": 3, "min_new_tokens": 4},
            "`min_new_tokens` must be <= `max_new_tokens`",
            "parameters.min_new_tokens",
        ),
        (
            "/generate",
            {"ignore_eos": True, "grammar": {"type": "regex", "value": "a"}},
            "`ignore_eos` must not be set with a grammar",
            "parameters.ignore_eos",
        ),
        (
            "/v1/completions",
            {"max_tokens": 3, "min_tokens": 4},
            "`min_new_tokens` must be <= `max_new_tokens`",
            "min_tokens",
        ),
        ("/v1/chat/completions", {"min_p": -1.0}, "`min_p` must be >= 0.0", "min_p"),
    ],
)
def test_what_makes_no_sense_is_refused_on_both_faces(
    stack: Stack, path: str, fields: dict[str, Any], text: str, field: str
) -> None:
    rpc, body = {
        "/generate": ("Generate", {"inputs": PROMPT, "parameters": fields}),
        "/v1/completions": ("Completions", {"prompt": [PROMPT], **fields}),
        "/v1/chat/completions": (
            "Chat",
            {"messages": [{"role": "user", "content": PROMPT}], **fields},
        ),
    }[path]
    reply = stack.http.post(path, json=body)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert text in reply.json()["error"]
    with pytest.raises(grpc.RpcError) as refused:
        result = ReflectionClient(stack.direct).call(rpc, body)
        list(result)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(refused.value) == ("validation", field)
