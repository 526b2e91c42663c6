"""Texts whose process is late, dies or has no memory cost nobody but their caller anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.errors import ErrorKind, ServiceError
from service.text.long_texts import LongTexts, TooManyTokensError

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
        max_reply_bytes=1000,
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
