"""Replies with whole texts."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import pytest

from service.api.whole_replies import WholeReplies
from service.generation.generation import Generation, PrefillToken, Token
from service.pb.tokenwire import v1 as pb
from tests.service.fakes import generation

TOKEN = Token(5, " a", -0.5, False)
FEW = generation(tokens=[TOKEN] * 512)
MANY = {
    "tokens": generation(tokens=[TOKEN] * 513),
    "tokens of the prompt": generation(prefill=[PrefillToken(5, " a", None)] * 513),
    "tokens of a candidate": generation(best_of_sequences=[generation(tokens=[TOKEN] * 513)]),
}
NAME: ContextVar[str] = ContextVar("NAME", default="")


async def test_a_small_reply_is_made_at_once() -> None:
    assert await WholeReplies().run([FEW], threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("result", MANY.values(), ids=MANY.keys())
async def test_a_long_reply_is_made_beside_the_event_loop(result: Generation) -> None:
    assert await WholeReplies().run([result], threading.get_ident) != threading.get_ident()


async def test_several_texts_are_long_together() -> None:
    assert await WholeReplies().run([FEW, FEW], threading.get_ident) != threading.get_ident()


async def test_a_reply_belongs_to_its_call_in_any_thread() -> None:
    NAME.set("this call")
    assert await WholeReplies().run([MANY["tokens"]], NAME.get) == "this call"


async def test_a_message_comes_as_its_bytes() -> None:
    message = pb.AbortResponse(aborted=3)
    assert await WholeReplies().made([FEW], lambda: message) == bytes(message)
