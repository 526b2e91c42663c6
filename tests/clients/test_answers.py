"""What the methods of both clients answer, from a service over a scripted engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from tokenwire_client import AsyncClient, TokenwireError
from tokenwire_client.messages import FinishReason

from tests.clients.callers import KINDS, Caller, calling
from tests.clients.conftest import Served
from tests.service.api.harness import PROMPT, TEXT
from tests.service.fakes import ADMIN_KEY, LIMITS, SERVER, demo_ids, eventually, script

MESSAGES = [{"role": "user", "content": "hello"}]
NUM_TOKENS = len(demo_ids(TEXT)) + 1  # and the end of the text


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
async def caller(request: pytest.FixtureRequest, served: Served) -> AsyncGenerator[Caller]:
    async with calling(request.param, served.address) as caller:
        yield caller


async def test_a_text_is_continued(caller: Caller) -> None:
    reply = await caller.call("generate", PROMPT, details=True, max_new_tokens=100)
    assert reply.generated_text == TEXT
    assert reply.details.finish_reason == FinishReason.FINISH_REASON_EOS_TOKEN
    assert reply.details.generated_tokens == NUM_TOKENS


async def test_a_text_is_continued_token_by_token(caller: Caller) -> None:
    *events, last = await caller.collect("generate_stream", PROMPT, details=True)
    texts = [event.token.text for event in events if not event.token.special]
    assert "".join(texts) == last.generated_text == TEXT
    assert last.details.finish_reason == FinishReason.FINISH_REASON_EOS_TOKEN


async def test_generation_is_greedy_unless_told_otherwise(caller: Caller, served: Served) -> None:
    await caller.call("generate", PROMPT)
    await caller.call("generate", PROMPT, do_sample=True)
    greedy, sampled = served.service.client.requests
    assert (greedy.sampling.do_sample, sampled.sampling.do_sample) == (False, True)


async def test_a_conversation_is_continued(caller: Caller) -> None:
    reply = await caller.call("chat", MESSAGES, max_tokens=3, temperature=0.0)
    (choice,) = reply.choices
    assert choice.message.content
    assert TEXT.startswith(choice.message.content)
    assert (choice.finish_reason, choice.reason) == ("length", FinishReason.FINISH_REASON_LENGTH)
    assert reply.usage.completion_tokens == 3


async def test_a_conversation_is_continued_token_by_token(caller: Caller) -> None:
    *chunks, end, usage = await caller.collect("chat_stream", MESSAGES, include_usage=True)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    assert end.choices[0].reason == FinishReason.FINISH_REASON_EOS_TOKEN
    assert usage.usage.completion_tokens == NUM_TOKENS


@pytest.mark.parametrize(("prompts", "count"), [("one", 1), (["one", "two"], 2)])
async def test_prompts_are_completed(caller: Caller, prompts: Any, count: int) -> None:
    reply = await caller.call("completions", prompts, max_tokens=2)
    assert [choice.index for choice in reply.choices] == list(range(count))
    assert {choice.reason for choice in reply.choices} == {FinishReason.FINISH_REASON_LENGTH}


async def test_prompts_are_completed_token_by_token(caller: Caller) -> None:
    parts = await caller.collect("completions_stream", ["a", "b"], max_tokens=2, temperature=0.0)
    choices = [part.choices[0] for part in parts]
    assert [choice.index for choice in choices] == [0, 1, 0, 1]
    none, length = FinishReason.FINISH_REASON_UNSPECIFIED, FinishReason.FINISH_REASON_LENGTH
    assert [choice.reason for choice in choices] == [none, none, length, length]


async def test_a_text_is_tokenized(caller: Caller) -> None:
    tokens = await caller.call("tokenize", "said the fox")
    assert "".join(token.text for token in tokens) == "said the fox"


async def test_the_server_tells_its_limits(caller: Caller) -> None:
    info = await caller.call("info")
    assert info.model_id == SERVER.model_id
    assert info.max_input_tokens == LIMITS.max_input_tokens


@pytest.mark.parametrize("kind", KINDS)
async def test_adapters_are_loaded_and_unloaded(kind: type[Any], served: Served) -> None:
    async with calling(kind, served.address, api_key=ADMIN_KEY) as caller:
        loaded = await caller.call("load_adapter", "pirate", "a/pirate", replaces=True)
        assert (loaded.name, loaded.path, loaded.rank) == ("pirate", "a/pirate", 4)
        assert [*served.service.client.adapters] == ["pirate"]
        assert await caller.call("adapters") == []  # this service lists none
        await caller.call("unload_adapter", "pirate")
        assert not served.service.client.adapters
        with pytest.raises(TokenwireError) as refused:
            await caller.call("unload_adapter", "pirate")
    assert (refused.value.code, refused.value.field) == (grpc.StatusCode.NOT_FOUND, "lora_name")


async def test_health_is_the_servers(caller: Caller, served: Served) -> None:
    assert await caller.call("health") is True
    served.service.client.is_healthy = False
    assert await caller.call("health") is False


async def test_a_stream_that_is_closed_early_is_aborted(caller: Caller, served: Served) -> None:
    reply = await caller.first("generate_stream", PROMPT)
    assert reply.index == 1
    await eventually(served.service.is_idle)


async def test_a_call_that_is_cancelled_is_aborted(served: Served) -> None:
    served.service.use_script(script(asyncio.Event()))
    async with AsyncClient(served.address) as client:
        task = asyncio.create_task(client.generate(PROMPT))
        await eventually(lambda: served.service.client.num_open == 1)
        task.cancel()
        await eventually(lambda: served.service.client.num_open == 0)
        assert task.cancelled()


async def test_an_answer_of_one_message_is_read_to_its_end(caller: Caller, served: Served) -> None:
    await caller.call("chat", MESSAGES, max_tokens=1)
    await caller.call("completions", "a", max_tokens=1)
    exposition = served.service.metrics.exposition().decode()
    cancelled = r'^grpc_server_handled_total{code="CANCELLED",.*} (.*)$'
    assert set(re.findall(cancelled, exposition, re.MULTILINE)) <= {"0.0"}
    assert served.service.client.num_aborted == 0


@pytest.mark.parametrize(
    ("name", "argument", "options"),
    [
        ("generate", PROMPT, {"max_tokens": 3}),
        ("generate", PROMPT, {"max_new_tokens": "three"}),
        ("generate", PROMPT, {"max_new_tokens": -1}),
        ("generate", PROMPT, {"grammar": {"type": "xml", "value": ""}}),
        ("generate_stream", PROMPT, {"http": 5}),
        ("chat", [{"role": "user", "text": "hello"}], {}),
        ("chat", MESSAGES, {"tools": [{"type": "function", "function": {"title": "f"}}]}),
        ("chat", MESSAGES, {"response_format": {"type": "xml"}}),
        ("chat_stream", MESSAGES, {"temperature": "hot"}),
        ("completions", "a", {"max_new_tokens": 3}),
    ],
)
async def test_an_option_that_has_no_place_is_refused_before_the_call(
    caller: Caller, served: Served, name: str, argument: Any, options: dict[str, Any]
) -> None:
    with pytest.raises((TypeError, ValueError)):
        await caller.call(name, argument, **options)
    assert served.service.client.requests == []
