"""Long lists of tokens go out in parts, and cost nothing once their caller stops reading."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.codec.presenter import TypedPresenter
from service.errors import ErrorKind, ServiceError, slow_reader
from service.text.long_texts import LongTexts
from tests.service.api.harness import Service, demo_tokenizer

LONG = "list " * 10_000


@pytest.fixture
async def long_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[LongTexts]:
    """A process that lists every text as three parts."""
    made = LongTexts(
        "tests.service.text.unruly_worker",
        [str(tmp_path / "starts")],
        deadline_s=600.0,
        max_bytes=1 << 20,
        num_workers=1,
    )
    monkeypatch.setattr(demo_tokenizer(), "long_texts", made)
    yield made
    await made.close()


@pytest.fixture
def call() -> Any:
    """A gRPC caller's call; `end` is what ends it when the caller does not read."""
    made = SimpleNamespace(is_rest=False, presenter=TypedPresenter(), failure=None, end=None)
    made.end_unread_by = lambda end: setattr(made, "end", end)
    made.headers = {}

    async def send_headers(headers: dict[str, str]) -> None:
        made.headers |= headers

    made.send_headers = send_headers
    return made


async def test_a_stream_has_a_message_for_each_part(long_texts: LongTexts, call: Any) -> None:
    service = Service()
    replies = [reply async for reply in service.servicer.tokenize_stream(LONG, call)]
    assert replies == [b"a", b"bc", b"def"]
    assert call.headers == {"x-accel-buffering": "yes"}
    assert long_texts._lists.num_held == 0


async def test_lists_pass_as_they_are_read_when_enough_long_ones_are_held(
    long_texts: LongTexts, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.token_lists._MAX_HELD_BYTES", 5)
    monkeypatch.setattr("service.api.token_lists._LONG_HELD_BYTES", 2 * 6)
    servicer, heads = Service().servicer, []
    for _ in range(3):
        call.headers = {}
        replies = [reply async for reply in servicer.tokenize_stream(LONG, call)]
        assert b"".join(replies) == b"abcdef"
        heads.append(call.headers)
    assert heads == [{"x-accel-buffering": "yes"}, {"x-accel-buffering": "yes"}, {}]


async def test_a_unary_reply_has_all_parts(long_texts: LongTexts, call: Any) -> None:
    assert await Service().servicer.tokenize(LONG, call) == b"abcdef"


async def test_no_permit_is_held_while_a_list_is_read(long_texts: LongTexts, call: Any) -> None:
    service = Service()
    stream = service.servicer.tokenize_stream(LONG, call)
    assert await anext(stream) == b"a"
    assert service.admission.num_active == 0
    await stream.aclose()
    assert long_texts._lists.num_held == 0


async def test_a_list_that_is_not_read_frees_its_memory_and_ends_in_an_error(
    long_texts: LongTexts, call: Any
) -> None:
    stream = Service().servicer.tokenize_stream(LONG, call)
    assert await anext(stream) == b"a"
    assert long_texts._lists.num_held == 6
    call.failure = slow_reader(30)
    await call.end()
    assert long_texts._lists.num_held == 0
    with pytest.raises(ServiceError) as ended:
        await anext(stream)
    assert ended.value.kind is ErrorKind.SLOW_READER
