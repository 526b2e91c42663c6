"""Prompts and answers as token ids, and what is told of an answer beside its text."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient, details
from tests.e2e.stack import PROMPT, Stack

GREEDY = {"max_new_tokens": 8, "ignore_eos": True}
CONVERSATION = [{"role": "user", "content": PROMPT}]


@pytest.fixture(params=["direct", "envoy"])
def api(request: pytest.FixtureRequest, stack: Stack) -> ReflectionClient:
    """A client of the service's port, and one of the gateway's."""
    return ReflectionClient(stack.direct if request.param == "direct" else stack.through_envoy)


@pytest.fixture
def prompt_ids(stack: Stack) -> list[int]:
    """The prompt's tokens, as the server sees them."""
    prefill = stack.generate(decoder_input_details=True)["details"]["prefill"]
    return [token["id"] for token in prefill]


def refused(call: Any) -> tuple[grpc.StatusCode, str | None, str]:
    """The code, the field and the text of a failure."""
    with pytest.raises(grpc.RpcError) as failed:
        list(call()) if hasattr(result := call(), "__iter__") else result
    return failed.value.code(), details(failed.value)[1], failed.value.details()


def test_token_ids_are_a_prompt(api: ReflectionClient, prompt_ids: list[int]) -> None:
    by_text = api.call("Generate", {"inputs": PROMPT, "parameters": GREEDY})
    by_ids = api.call("Generate", {"input_ids": {"ids": prompt_ids}, "parameters": GREEDY})
    assert by_ids.token_ids == by_text.token_ids
    assert by_ids.generated_text == by_text.generated_text
    *_, last = api.call("GenerateStream", {"input_ids": {"ids": prompt_ids}, "parameters": GREEDY})
    assert last.generated_text == by_text.generated_text


def test_token_ids_have_a_text_and_can_be_truncated(
    api: ReflectionClient, prompt_ids: list[int]
) -> None:
    full = {**GREEDY, "return_full_text": True}
    whole = api.call("Generate", {"input_ids": {"ids": prompt_ids}, "parameters": full})
    assert PROMPT in whole.generated_text
    assert len(whole.generated_text) > len(PROMPT)
    end = {"input_ids": {"ids": prompt_ids[-3:]}, "parameters": GREEDY}
    cut = {"input_ids": {"ids": prompt_ids}, "parameters": {**GREEDY, "truncate": 3}}
    assert api.call("Generate", cut).usage.prompt_tokens == 3
    assert api.call("Generate", cut).token_ids == api.call("Generate", end).token_ids


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"inputs": "x", "input_ids": {"ids": [1]}}, "input_ids", "only one of"),
        ({"input_ids": {"ids": []}}, "input_ids", "cannot be empty"),
        ({"input_ids": {"ids": [1, 4294967295]}}, "input_ids", "must be <"),
        ({}, "inputs", "missing field"),
    ],
)
def test_token_ids_that_are_no_prompt_are_refused(
    api: ReflectionClient, fields: dict[str, Any], field: str, text: str
) -> None:
    for method in ("Generate", "GenerateStream", "Invocations"):
        if method == "Invocations" and len(fields) == 2:
            continue  # both mean the same endpoint there
        code, at, said = refused(lambda method=method: api.call(method, fields))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert (at, text in said) == (field, True), said


def test_prompts_of_completions_may_be_token_ids(
    stack: Stack, api: ReflectionClient, prompt_ids: list[int]
) -> None:
    shared = {"max_tokens": 8, "temperature": 0.0}
    rest = stack.http.post("/v1/completions", json={"prompt": [PROMPT, "Hello"], **shared}).json()
    texts = [choice["text"] for choice in rest["choices"]]
    hello = [token["id"] for token in stack.http.post("/tokenize", json={"inputs": "Hello"}).json()]
    both = {"prompt_ids": [{"ids": prompt_ids}, {"ids": hello}], **shared}
    [typed] = api.collect("Completions", both)
    assert [choice.text for choice in typed.completion.choices] == texts
    for prompt, expected in (([prompt_ids, hello], texts), (prompt_ids, texts[:1])):
        reply = stack.http.post("/v1/completions", json={"prompt": prompt, **shared})
        assert [choice["text"] for choice in reply.json()["choices"]] == expected


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (["a", [1]], "prompt: texts, numbers and lists must not be mixed"),
        ([1, "a"], "prompt: texts, numbers and lists must not be mixed"),
        ([-1], "prompt[0]: expected an integer >= 0"),
        ([1.5], "prompt[0]: expected an integer or a string or a list, got a number"),
        ([[1], [True]], "prompt[1][0]: expected an integer, got a boolean"),
        ([[]], "a prompt's token ids cannot be empty"),
        ([[4294967295]], "a prompt's token ids must be <"),
    ],
)
def test_rest_prompts_that_are_no_token_ids_are_refused(
    stack: Stack, prompt: Any, text: str
) -> None:
    reply = stack.http.post("/v1/completions", json={"prompt": prompt})
    assert reply.status_code == 422
    assert text in reply.json()["error"]


def test_answers_without_text_have_the_same_tokens(api: ReflectionClient) -> None:
    with_text = api.call("Generate", {"inputs": PROMPT, "parameters": GREEDY})
    bare = {**GREEDY, "detokenize": False, "details": True, "top_n_tokens": 2}
    bare["decoder_input_details"] = True
    ids = api.call("Generate", {"inputs": PROMPT, "parameters": bare})
    assert ids.token_ids == with_text.token_ids
    assert [token.id for token in ids.details.tokens] == list(with_text.token_ids)
    texts = [token.text for token in (*ids.details.tokens, *ids.details.prefill)]
    texts += [token.text for step in ids.details.top_tokens for token in step.tokens]
    assert set(texts) == {""} == {ids.generated_text}
    bare.pop("decoder_input_details")
    events = api.collect("GenerateStream", {"inputs": PROMPT, "parameters": bare})
    assert [event.token.id for event in events] == list(with_text.token_ids)
    assert {event.token.text for event in events} == {""}


def test_stop_sequences_need_text(api: ReflectionClient) -> None:
    parameters = {"detokenize": False, "stop": ["a"]}
    code, field, _ = refused(
        lambda: api.call("Generate", {"inputs": PROMPT, "parameters": parameters})
    )
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "parameters.detokenize")


def test_every_reply_says_what_it_took(stack: Stack, api: ReflectionClient) -> None:
    prompt = "Tell me what every reply took. " * 8
    request = {"inputs": prompt, "parameters": GREEDY}
    first = api.call("Generate", request).usage
    again = api.call("Generate", request).usage
    assert first.prompt_tokens == again.prompt_tokens > first.cached_tokens
    assert again.cached_tokens >= first.cached_tokens
    assert 0 < again.cached_tokens < again.prompt_tokens
    assert first.completion_tokens == 8
    assert first.total_tokens == first.prompt_tokens + 8
    *earlier, last = api.collect("GenerateStream", request)
    assert last.usage == again
    assert not any(event.HasField("usage") for event in earlier)
    chat = {"messages": CONVERSATION, "max_tokens": 4, "temperature": 0.0}
    [whole] = api.collect("Chat", chat)
    *_, chunk = api.collect("Chat", {**chat, "stream": True})
    assert chunk.chunk.usage.completion_tokens == whole.completion.usage.completion_tokens == 4
    completions = {"prompt": [PROMPT], "max_tokens": 4, "temperature": 0.0}
    [whole] = api.collect("Completions", completions)
    *_, part = api.collect("Completions", {**completions, "stream": True})
    assert part.completion.usage.prompt_tokens == whole.completion.usage.prompt_tokens > 0


def test_candidates_that_lost_are_counted(api: ReflectionClient) -> None:
    parameters = {"best_of": 2, "do_sample": True, "max_new_tokens": 5, "ignore_eos": True}
    reply = api.call("Generate", {"inputs": PROMPT, "parameters": parameters})
    assert reply.usage.completion_tokens == 10
    assert len(reply.token_ids) == 5


def test_every_reply_says_which_stop_matched(stack: Stack, api: ReflectionClient) -> None:
    free = api.call("Generate", {"inputs": PROMPT, "parameters": GREEDY})
    assert not free.HasField("matched_stop")
    text = free.generated_text
    word = text.split()[1]
    stop = {**GREEDY, "stop": ["never there", word]}
    for reply in (
        api.call("Generate", {"inputs": PROMPT, "parameters": stop}),
        api.collect("GenerateStream", {"inputs": PROMPT, "parameters": stop})[-1],
    ):
        assert reply.matched_stop.sequence == word
        assert reply.finish_reason == 3  # FINISH_REASON_STOP_SEQUENCE
    token_id = free.token_ids[3]
    ends = {**GREEDY, "stop_token_ids": [token_id]}
    reply = api.call("Generate", {"inputs": PROMPT, "parameters": ends})
    assert reply.matched_stop.token_id == token_id
    completions = {"prompt": [PROMPT], "stop": [word], "temperature": 0.0}
    [whole] = api.collect("Completions", completions)
    *_, part = api.collect("Completions", {**completions, "stream": True})
    for completion in (whole.completion, part.completion):
        assert completion.choices[0].matched_stop.sequence == word
    chat = {"messages": CONVERSATION, "temperature": 0.0, "max_tokens": 12}
    [answer] = api.collect("Chat", chat)
    word = answer.completion.choices[0].message.content.split()[1]
    [whole] = api.collect("Chat", {**chat, "stop": [word]})
    *_, chunk = api.collect("Chat", {**chat, "stop": [word], "stream": True})
    assert whole.completion.choices[0].matched_stop.sequence == word
    assert chunk.chunk.choices[0].matched_stop.sequence == word
