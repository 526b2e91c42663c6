"""Streams that are silent for long: REST callers receive comments, gRPC callers nothing."""

from __future__ import annotations

import asyncio

import pytest

from engine.protocol.request import FinishReason
from service.api import generations
from service.pb.tokenwire import v1 as pb
from tests.service.api.harness import Service
from tests.service.fakes import demo_ids, eventually, script, step

pytestmark = pytest.mark.usefixtures("no_task_left")

MESSAGE = {"role": "user", "content": "hi"}

SHORT_S = 0.001


@pytest.mark.parametrize("name", ["GenerateStream", "CompatGenerate", "Chat", "Completions"])
async def test_a_silent_stream_sends_comments_to_rest_callers_only(
    service: Service, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(generations, "KEEP_ALIVE_S", SHORT_S)
    request = {
        "GenerateStream": pb.GenerateRequest(inputs="a", parameters=pb.GenerateParameters()),
        "CompatGenerate": pb.CompatGenerateRequest(inputs="a", stream=True),
        "Chat": pb.ChatRequest(messages=[pb.Message.from_dict(MESSAGE)], stream=True),
        "Completions": pb.CompletionsRequest(prompt=["a"], stream=True),
    }[name]
    for is_rest in (True, False):
        silence = asyncio.Event()
        service.use_script(script(silence, step(demo_ids("x")[0], finish=FinishReason.LENGTH)))
        replies = aiter(service.call(name, request, rest=is_rest))
        if is_rest:
            comment = await anext(replies)
            assert comment.http.data == b":\n\n"
            assert comment.http.content_type == "text/event-stream"
        else:
            await eventually(lambda: service.client.num_open == 1)
            await asyncio.sleep(5 * SHORT_S)
        silence.set()
        rest = [reply async for reply in replies]
        rest = [reply for reply in rest if reply.http is None or reply.http.data != b":\n\n"]
        is_openai = name in ("Chat", "Completions")
        assert len(rest) == (2 if is_rest and is_openai else 1)
        assert all((reply.http is None) is not is_rest for reply in rest)
