"""Texts whose process is late, dies or has no memory cost nobody but their caller anything."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.errors import ErrorKind, ServiceError
from service.text import long_texts
from service.text.long_texts import LongTexts, TooManyTokensError
from service.workers import process

NEVER_S = 600.0


class Texts:
    """One process, and how often it was started."""

    def __init__(self, long_texts: LongTexts, starts: Path) -> None:
        self.long_texts = long_texts
        self._starts = starts

    async def encode(self, text: str) -> tuple[int, ...]:
        return await self.long_texts.encode(text, None, 100)

    async def refused(self, text: str) -> ServiceError:
        """The error that a text gets."""
        with pytest.raises(ServiceError) as caught:
            await self.encode(text)
        return caught.value

    @property
    def num_starts(self) -> int:
        return len(self._starts.read_text().splitlines())


@asynccontextmanager
async def running(
    directory: Path, deadline_s: float = NEVER_S, max_bytes: int = 10
) -> AsyncIterator[Texts]:
    starts = directory / "starts"
    long_texts = LongTexts(
        "tests.service.text.unruly_worker",
        [str(starts)],
        deadline_s=deadline_s,
        max_bytes=max_bytes,
        num_workers=1,
    )
    await long_texts.start()
    try:
        yield Texts(long_texts, starts)
    finally:
        await long_texts.close()


async def test_a_process_answers_many_texts(tmp_path: Path) -> None:
    async with running(tmp_path) as texts:
        assert [await texts.encode("fine") for _ in range(3)] == 3 * [(1, 2, 3)]
        with pytest.raises(TooManyTokensError) as counted:
            await texts.encode("counts")
        assert counted.value.count == 7
        assert texts.num_starts == 1


async def test_a_text_that_works_too_long_is_refused_and_its_process_replaced(
    tmp_path: Path,
) -> None:
    # On a busy machine it may have had no processor: then the machine is at fault.
    async with running(tmp_path, deadline_s=0.5) as texts:
        error = await texts.refused("works")
        if error.kind is not ErrorKind.OVERLOADED:
            assert error.kind is ErrorKind.VALIDATION
            assert (error.reason, error.field) == (
                "`inputs` takes more than 0.5 s to tokenise",
                "inputs",
            )
    async with running(tmp_path) as texts:
        assert await texts.encode("fine") == (1, 2, 3)


async def test_a_text_that_only_waited_is_told_that_the_machine_is_busy(tmp_path: Path) -> None:
    async with running(tmp_path, deadline_s=0.2) as texts:
        assert (await texts.refused("waits")).kind is ErrorKind.OVERLOADED
        assert texts.num_starts == 1


async def test_a_text_that_kills_two_processes_is_refused_and_the_next_one_is_not(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as texts:
        error = await texts.refused("dies")
        assert error.kind is ErrorKind.VALIDATION
        assert error.reason == "`inputs` needs too much memory to tokenise"
        assert texts.num_starts == 2
        assert await texts.encode("fine") == (1, 2, 3)
        assert texts.num_starts == 3


async def test_a_process_that_dies_while_nobody_asks_it_costs_no_text_anything(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as texts:
        (worker,) = texts.long_texts._crew._all
        assert worker._process is not None
        worker._process.kill()
        await worker._process.wait()
        assert await texts.encode("fine") == (1, 2, 3)
        assert texts.num_starts == 2


async def test_a_text_whose_process_does_not_come_up_is_told_that_the_machine_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as texts:
        assert (await texts.refused("dies")).kind is ErrorKind.VALIDATION
        monkeypatch.setattr(process, "START_S", 0.0)
        assert (await texts.refused("fine")).kind is ErrorKind.OVERLOADED
        monkeypatch.undo()
        assert await texts.encode("fine") == (1, 2, 3)


async def test_a_text_without_memory_is_refused_by_the_same_process(tmp_path: Path) -> None:
    async with running(tmp_path) as texts:
        error = await texts.refused("has no memory")
        assert error.reason == "`inputs` needs too much memory to tokenise"
        assert await texts.encode("fine") == (1, 2, 3)
        assert texts.num_starts == 1


async def test_texts_beyond_the_budget_are_refused_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, max_bytes=10) as texts:
        waiting = asyncio.create_task(texts.encode("waits"))
        await asyncio.sleep(0)
        assert (await texts.refused("six more")).kind is ErrorKind.OVERLOADED
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await texts.encode("six more") == (1, 2, 3)


async def test_a_list_comes_in_parts_and_takes_memory_until_it_is_sent(tmp_path: Path) -> None:
    async with running(tmp_path, max_bytes=100) as texts:
        listed = texts.long_texts.tokens_listed("fine", "rest", is_prompt=False)
        async with listed as messages:
            assert list(messages) == [b"a", b"bc", b"def"]
            assert texts.long_texts._lists.num_held == 6
        assert texts.long_texts._lists.num_held == 0


@pytest.mark.parametrize(
    ("text", "is_prompt", "reason"),
    [
        (
            "is too large",
            False,
            "`inputs` has too many tokens: their list must have at most 5 bytes. "
            "Given: 12 characters",
        ),
        ("dies in the middle", True, "`messages` needs too much memory to tokenise"),
    ],
)
async def test_a_list_that_is_not_whole_is_refused_before_its_first_part(
    tmp_path: Path, text: str, is_prompt: bool, reason: str
) -> None:
    async with running(tmp_path, max_bytes=100) as texts:
        with pytest.raises(ServiceError) as refused:
            async with texts.long_texts.tokens_listed(
                text, "typed", is_prompt=is_prompt, max_bytes=5
            ):
                pass
        assert refused.value.reason == reason
        assert await texts.encode("fine") == (1, 2, 3)


async def test_lists_that_nobody_reads_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.text.long_texts._MAX_LISTED_BYTES", 11)
    async with running(tmp_path, max_bytes=100) as texts:
        listed = texts.long_texts.tokens_listed
        async with listed("first", "rest", is_prompt=False):
            with pytest.raises(ServiceError) as refused:
                async with listed("second", "rest", is_prompt=False):
                    pass
            assert refused.value.kind is ErrorKind.OVERLOADED
        async with listed("third", "rest", is_prompt=False) as messages:
            assert len(messages) == 3


async def test_a_list_of_tokens_is_the_same_in_slices() -> None:
    ids = array("I", range(long_texts._SLICE * 2 + 1))
    assert await long_texts._token_ids(ids) == tuple(ids)


def test_a_conversation_is_the_same_message_by_message() -> None:
    messages = [{"role": "user", "content": "é"}, {"role": "tool", "n": 2**80}]
    for parts in ((messages, None, {}), ([], [{"a": [1]}], {"b": "c"})):
        assert long_texts._json(*parts) == json.dumps(list(parts), ensure_ascii=False)
