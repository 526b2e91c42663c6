"""The paths of OpenAI without a stream: chat and completions."""

from __future__ import annotations

from tests.e2e import shapes
from tests.e2e.rest_replies import (
    GENERATION_HEADERS,
    check_generation_headers,
    custom_headers,
    post,
)
from tests.e2e.stack import PROMPT, Stack

CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "temperature": 0.0}
COMPLETION = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0.0}


def test_chat_has_the_fields_and_headers_of_the_contract(stack: Stack) -> None:
    reply = post(stack, "/v1/chat/completions", CHAT)
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == {*GENERATION_HEADERS, "x-compute-time"}
    body = reply.json()
    shapes.check_chat(body, stack.http.get("/info").json()["model_id"])
    usage = body["usage"]
    assert reply.headers["x-prompt-tokens"] == str(usage["prompt_tokens"])
    assert reply.headers["x-generated-tokens"] == str(usage["completion_tokens"])
    assert int(reply.headers["x-compute-characters"]) > len(PROMPT)  # of the whole template
    again = post(stack, "/v1/chat/completions", CHAT).json()
    assert again["choices"] == body["choices"]


def test_chat_returns_log_probabilities(stack: Stack) -> None:
    wanted = {**CHAT, "logprobs": True, "top_logprobs": 2}
    body = post(stack, "/v1/chat/completions", wanted).json()
    shapes.check_chat(body, body["model"], logprobs=True, num_top=2)
    bare = post(stack, "/v1/chat/completions", {**CHAT, "logprobs": True}).json()
    assert all(not item["top_logprobs"] for item in bare["choices"][0]["logprobs"]["content"])


def test_chat_content_may_be_parts(stack: Stack) -> None:
    middle = len(PROMPT) // 2
    parts = [{"type": "text", "text": text} for text in (PROMPT[:middle], PROMPT[middle:])]
    split = {**CHAT, "messages": [{"role": "user", "content": parts}]}
    assert (
        post(stack, "/v1/chat/completions", split).json()["choices"]
        == post(stack, "/v1/chat/completions", CHAT).json()["choices"]
    )


def test_chat_seed_determines_the_text(stack: Stack) -> None:
    wanted = {**CHAT, "temperature": 20.0, "max_tokens": 12}
    first, again, other = (
        post(stack, "/v1/chat/completions", {**wanted, "seed": seed}).json()["choices"]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_completion_has_the_fields_and_headers_of_the_contract(stack: Stack) -> None:
    reply = post(stack, "/v1/completions", COMPLETION)
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == GENERATION_HEADERS  # no x-compute-time, as in TGI
    check_generation_headers(reply, characters=len(PROMPT))
    body = reply.json()
    shapes.check_completion(body, stack.http.get("/info").json()["model_id"], 1)
    expected = stack.generate(max_new_tokens=6)
    assert body["choices"][0]["text"] == expected["generated_text"]
    assert expected["details"]["finish_reason"] == "length"
    assert body["choices"][0]["finish_reason"] == "length"


def test_several_prompts_give_a_choice_each(stack: Stack) -> None:
    prompts = [PROMPT, "The capital of France is", "1, 2, 3,"]
    reply = post(stack, "/v1/completions", {**COMPLETION, "prompt": prompts})
    body = reply.json()
    shapes.check_completion(body, body["model"], len(prompts))
    check_generation_headers(reply, characters=sum(map(len, prompts)))
    single = [
        post(stack, "/v1/completions", {**COMPLETION, "prompt": prompt}).json()
        for prompt in prompts
    ]
    assert [choice["text"] for choice in body["choices"]] == [
        item["choices"][0]["text"] for item in single
    ]
    assert body["usage"]["total_tokens"] == sum(item["usage"]["total_tokens"] for item in single)
