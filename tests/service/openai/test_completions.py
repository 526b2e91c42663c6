"""Several prompts in one request: refusals, and the order of their streams' events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ErrorKind, ServiceError
from service.generation.generation import Token, TokenEvent
from service.generation.parameters import Parameters
from service.generation.turns import round_robin
from service.openai.completions import CompletionAnswer, CompletionsRequest
from service.openai.usage import Usage
from tests.service.fakes import ANSWER_HEAD, LIMITS, TIMEOUT_S, generation, generation_request


class Streams:
    """Streams of numbered tokens; None in a stream's list is a failure."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    async def make(
        self, name: str, ids: list[int | None], *, endless: bool = False
    ) -> AsyncGenerator[TokenEvent]:
        try:
            for token_id in ids:
                if token_id is None:
                    raise ServiceError(ErrorKind.GENERATION, name)
                yield TokenEvent(Token(token_id, name, None, False), [])
            if endless:
                await asyncio.Event().wait()
        finally:
            self.closed.append(name)


async def turns(streams: list[AsyncGenerator[TokenEvent]]) -> list[tuple[int, int | str]]:
    async with aclosing(round_robin(streams)) as events:
        return [
            (index, str(event) if isinstance(event, ServiceError) else event.token.id)
            async for index, event in events
        ]


async def test_streams_take_turns() -> None:
    make = Streams().make
    got = await turns([make("a", [10, 11, 12]), make("b", [20]), make("c", [30, 31])])
    assert got == [(0, 10), (1, 20), (2, 30), (0, 11), (2, 31), (0, 12)]


async def test_a_failure_takes_its_turn_and_the_others_continue() -> None:
    make = Streams().make
    got = await turns([make("a", [10, None]), make("b", [20, 21, 22])])
    failure = "Request failed during generation: a"
    assert got == [(0, 10), (1, 20), (0, failure), (1, 21), (1, 22)]


async def test_a_stream_may_fail_at_once() -> None:
    make = Streams().make
    failure = "Request failed during generation: a"
    assert await turns([make("a", [None]), make("b", [20])]) == [(0, failure), (1, 20)]


@given(st.lists(st.lists(st.integers(0, 9) | st.none(), max_size=5), max_size=4))
async def test_no_event_is_lost_and_each_stream_keeps_its_order(
    lists: list[list[int | None]],
) -> None:
    streams = Streams()
    got = await turns([streams.make(str(i), ids) for i, ids in enumerate(lists)])
    for number, ids in enumerate(lists):
        until_failure = ids[: ids.index(None) + 1] if None in ids else ids
        own = [event if isinstance(event, int) else None for index, event in got if index == number]
        assert own == until_failure
    assert sorted(streams.closed) == sorted(map(str, range(len(lists))))


async def test_no_stream_gets_two_turns_in_a_round() -> None:
    make = Streams().make
    got = await turns([make(str(i), list(range(i + 1))) for i in range(4)])
    assert [index for index, _ in got] == [0, 1, 2, 3, 1, 2, 3, 2, 3, 3]


async def test_closing_early_closes_all_streams() -> None:
    streams = Streams()
    names = ["a", "b", "c"]
    events = round_robin([streams.make(name, [1], endless=True) for name in names])
    assert (await anext(events))[0] == 0
    await events.aclose()
    assert sorted(streams.closed) == names


async def test_a_cancelled_reader_closes_all_streams() -> None:
    streams = Streams()
    task = asyncio.create_task(turns([streams.make(name, [], endless=True) for name in "ab"]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(streams.closed) == ["a", "b"]


async def test_an_unexpected_error_closes_all_streams() -> None:
    async def broken() -> AsyncGenerator[TokenEvent]:
        raise RuntimeError("defect")
        yield

    streams = Streams()
    with pytest.raises(RuntimeError, match="defect"):
        await turns([broken(), streams.make("b", [1], endless=True)])
    assert streams.closed == ["b"]


async def test_streams_work_at_the_same_time() -> None:
    all_started = asyncio.Barrier(3)

    async def stream() -> AsyncGenerator[TokenEvent]:
        await all_started.wait()
        yield TokenEvent(Token(1, "", None, False), [])

    async with asyncio.timeout(TIMEOUT_S):
        assert len(await turns([stream() for _ in range(3)])) == 3


def refusal(**changes: object) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        CompletionsRequest(parameters=Parameters(), **changes).check(LIMITS)  # type: ignore[arg-type]
    return refused.value


@pytest.mark.parametrize("suffix", ["", "x"])
def test_a_suffix_is_refused_first(suffix: str) -> None:
    error = refusal(prompts=("a",) * 5, suffix=suffix)
    assert error.kind is ErrorKind.SUFFIX
    text = "Suffix is not supported and can be achieved by preprocessing the prompt."
    assert (error.message, error.field) == (text, "suffix")


def test_prompts_are_required() -> None:
    error = refusal(prompts=())
    assert (error.kind, error.field) == (ErrorKind.SHAPE, "prompt")
    assert error.message.endswith("missing field `prompt`")


def test_too_many_prompts_are_refused() -> None:
    error = refusal(prompts=("a",) * 5)
    assert error.kind is ErrorKind.BATCH_SIZE
    text = "Number of prompts exceeds the maximum allowed batch size of 4"
    assert (error.message, error.field) == (text, "prompt")


def test_as_many_prompts_as_allowed_are_accepted() -> None:
    CompletionsRequest(prompts=("",) * 4, parameters=Parameters()).check(LIMITS)


def test_usage_is_summed() -> None:
    results = [generation(), generation(request=generation_request(prompt_token_ids=(1,)))]
    answer = CompletionAnswer(head=ANSWER_HEAD, choices=[[item] for item in results])
    assert answer.usage == Usage(4, 4)
