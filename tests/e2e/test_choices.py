"""Several answers to one prompt (`n`), over both faces."""

from __future__ import annotations

import uuid
from typing import Any

import openai
import pytest

from tests.e2e.reflection_client import ReflectionClient, as_dict
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack
from tests.e2e.typed_messages import failure, rest, rest_events

CHAT_PATH, COMPLETIONS_PATH = "/v1/chat/completions", "/v1/completions"
SAMPLED: dict[str, Any] = {"temperature": 20.0, "max_tokens": 6, "seed": 11}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], **SAMPLED}
COMPLETION: dict[str, Any] = {"prompt": PROMPT, **SAMPLED}
COMPLETIONS: dict[str, Any] = {"prompt": [PROMPT, "One, two,"], **SAMPLED}


def texts(body: dict[str, Any]) -> list[str]:
    """The texts of a whole answer, in the order of their indexes."""
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [
        choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices
    ]


def streamed_texts(events: list[dict[str, Any]]) -> dict[int, str]:
    """The texts of a stream by index. `text` may end with that of a control token."""
    found: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            part = choice["text"] if "text" in choice else choice["delta"]["content"]
            found[choice["index"]] = found.get(choice["index"], "") + part
    return found


@pytest.mark.parametrize(("path", "body"), [(CHAT_PATH, CHAT), (COMPLETIONS_PATH, COMPLETION)])
def test_choices_differ_and_follow_from_the_seed(
    stack: Stack, path: str, body: dict[str, Any]
) -> None:
    four = texts(rest(stack, path, {**body, "n": 4}))
    assert len(set(four)) == 4
    assert texts(rest(stack, path, {**body, "n": 2})) == four[:2]
    assert texts(rest(stack, path, body)) == four[:1]
    assert texts(rest(stack, path, {**body, "n": 4})) == four
    assert not set(texts(rest(stack, path, {**body, "n": 4, "seed": 12}))) & set(four)


@pytest.mark.parametrize(
    ("path", "body", "num_prompts"),
    [(CHAT_PATH, CHAT, 1), (COMPLETIONS_PATH, COMPLETION, 1), (COMPLETIONS_PATH, COMPLETIONS, 2)],
)
def test_usage_counts_a_prompt_once(
    stack: Stack, path: str, body: dict[str, Any], num_prompts: int
) -> None:
    one = rest(stack, path, body)["usage"]
    reply = stack.http.post(path, json={**body, "n": 3})
    usage = reply.json()["usage"]
    assert usage["prompt_tokens"] == one["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 3 * num_prompts <= usage["completion_tokens"] <= 3 * num_prompts * 6
    assert reply.headers["x-prompt-tokens"] == str(usage["prompt_tokens"])
    assert reply.headers["x-generated-tokens"] == str(usage["completion_tokens"])
    streamed = {**body, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
    assert rest_events(stack, path, streamed)[-1]["usage"] == usage


@pytest.mark.parametrize("body", [CHAT, {**CHAT, "temperature": 0.0}])
def test_stream_has_every_choice_under_its_index(stack: Stack, body: dict[str, Any]) -> None:
    whole = texts(rest(stack, CHAT_PATH, {**body, "n": 3}))
    events = rest_events(stack, CHAT_PATH, {**body, "n": 3, "stream": True})
    assert streamed_texts(events) == dict(enumerate(whole))
    ends = [item["choices"][0] for item in events if item["choices"][0]["finish_reason"]]
    assert sorted(item["index"] for item in ends) == [0, 1, 2]


def test_completions_are_numbered_prompt_by_prompt(stack: Stack) -> None:
    found = texts(rest(stack, COMPLETIONS_PATH, {**COMPLETIONS, "n": 2}))
    alone = [
        text
        for prompt in COMPLETIONS["prompt"]
        for text in texts(rest(stack, COMPLETIONS_PATH, {**COMPLETIONS, "prompt": prompt, "n": 2}))
    ]
    assert found == alone
    events = rest_events(stack, COMPLETIONS_PATH, {**COMPLETIONS, "n": 2, "stream": True})
    streamed = streamed_texts(events)
    assert all(streamed[index].startswith(text) for index, text in enumerate(found))


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("Chat", CHAT_PATH, CHAT), ("Completions", COMPLETIONS_PATH, COMPLETIONS)],
)
def test_grpc_callers_get_the_same(
    stack: Stack, api: ReflectionClient, method: str, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "n": 3}
    expected = rest(stack, path, body)
    (reply,) = api.collect(method, body)
    unary = api.call(f"{method}Unary", body)
    for message in (reply.completion, unary):
        choices = list(message.choices)
        assert [choice.index for choice in choices] == list(range(len(expected["choices"])))
        if method == "Chat":
            found = [choice.message.content for choice in choices]
        else:
            found = [choice.text for choice in choices]
        assert found == texts(expected)
        usage = as_dict(message.usage)
        assert {**usage, "cached_tokens": 0} == {**expected["usage"], "cached_tokens": 0}
    parts = [
        item.chunk if method == "Chat" else item.completion
        for item in api.collect(method, {**body, "stream": True})
    ]
    indexes = {choice.index for part in parts for choice in part.choices}
    assert indexes == set(range(len(expected["choices"])))


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_is_computed_once(stack: Stack, stream: bool) -> None:
    def computed() -> float:
        return stack.metric('tokenwire_prompt_tokens_total{source="computed"}')

    stack.wait_until_idle()
    words = " ".join(uuid.uuid4().hex for _ in range(8))  # nothing that the cache has
    before = computed()
    body = {"prompt": words, **SAMPLED, "n": 8}
    if stream:
        rest_events(stack, COMPLETIONS_PATH, {**body, "stream": True})
        num_prompt = rest(stack, COMPLETIONS_PATH, body)["usage"]["prompt_tokens"]
    else:
        num_prompt = rest(stack, COMPLETIONS_PATH, body)["usage"]["prompt_tokens"]
    stack.wait_until_idle()
    assert num_prompt > 100
    assert computed() - before < num_prompt + 16 * 16  # at most a block is computed again by each


def test_swagger_s_example_is_answered(stack: Stack) -> None:
    example = {**CHAT, "n": 2, "logprobs": False, "model": "mistralai/Mistral-7B-Instruct-v0.2"}
    assert len(rest(stack, CHAT_PATH, example)["choices"]) == 2


@pytest.mark.parametrize("n", [0, 17, 2**32 - 1])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("Chat", CHAT_PATH, CHAT), ("Completions", COMPLETIONS_PATH, COMPLETIONS)],
)
def test_no_choice_and_too_many_are_refused(
    stack: Stack, api: ReflectionClient, method: str, path: str, body: dict[str, Any], n: int
) -> None:
    text = f"Input validation error: `n` must be > 0 and <= 16. Given: {n}"
    reply = stack.http.post(path, json={**body, "n": n})
    assert (reply.status_code, reply.json()["error"]) == (422, text)
    assert failure(api, method, {**body, "n": n}).details() == text


def test_openai_s_client_gets_all_choices(stack: Stack) -> None:
    url = f"{stack.url}/v1"
    with openai.OpenAI(base_url=url, api_key="-", timeout=DEADLINE_S) as client:
        messages: Any = CHAT["messages"]
        output = client.chat.completions.create(
            model="m", messages=messages, n=3, max_tokens=6, seed=1, temperature=2.0
        )
        assert [choice.index for choice in output.choices] == [0, 1, 2]
        stream = client.completions.create(
            model="m", prompt=["a", "b"], n=2, max_tokens=3, stream=True
        )
        assert {chunk.choices[0].index for chunk in stream} == {0, 1, 2, 3}
