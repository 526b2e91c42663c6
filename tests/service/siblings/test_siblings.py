"""What service processes ask each other, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, disable_created_metrics

from service.errors import ErrorKind, ServiceError
from service.launch.place import Place
from service.siblings.line import Line
from service.siblings.series import SharedSeries
from service.siblings.siblings import Siblings
from tests.service.fakes import TIMEOUT_S


class Process:
    """One of several service processes, as far as the others know it."""

    def __init__(self, directory: Path, number: int, count: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        self.calls = Counter("calls", "Counted", registry=registry)
        self.aborted: list[tuple[str, str | None]] = []
        place = Place(number, count, directory)
        self.siblings = Siblings(place, SharedSeries(place, registry, ()), self.abort)

    def abort(self, request_id: str, caller: str | None) -> int:
        self.aborted.append((request_id, caller))
        return len(self.aborted)

    async def num_calls(self) -> float:
        collect = await self.siblings.series()
        (metric,) = collect()
        return metric.samples[0].value


@asynccontextmanager
async def processes(directory: Path, count: int) -> AsyncGenerator[list[Process]]:
    """All processes of a server."""
    async with AsyncExitStack() as stack:
        opened = [Process(directory, number, count) for number in range(1, count + 1)]
        for process in opened:
            await process.siblings.open()
            stack.push_async_callback(process.siblings.close)
        yield opened


async def test_calls_are_ended_wherever_they_are(tmp_path: Path) -> None:
    async with processes(tmp_path, 3) as (first, second, third):
        second.abort("x", None)
        assert await first.siblings.abort("id", "me") == 3  # of two calls and one
        assert first.aborted == []  # which has looked itself
        assert second.aborted[-1] == third.aborted[-1] == ("id", "me")


async def test_series_of_all_are_read_anew_each_time(tmp_path: Path) -> None:
    async with processes(tmp_path, 3) as all_of_them:
        for number, process in enumerate(all_of_them):
            process.calls.inc(number)
        assert [await process.num_calls() for process in all_of_them] == [3, 3, 3]
        all_of_them[0].calls.inc()
        assert await all_of_them[2].num_calls() == 4


async def test_what_one_has_counted_stays_when_it_ends(tmp_path: Path) -> None:
    async with processes(tmp_path, 2) as (first, second):
        second.calls.inc(5)
        await second.siblings.close()
        assert await first.num_calls() == 5
        assert await first.siblings.abort("id", None) == 0


async def test_a_process_can_be_asked_again_after_another_took_its_place(tmp_path: Path) -> None:
    async with processes(tmp_path, 2) as (first, second):
        await second.siblings.close()
        again = Process(tmp_path, 2, 2)
        await again.siblings.open()
        again.calls.inc()
        assert await first.siblings.abort("id", "me") == 1
        assert await first.num_calls() == 1
        await again.siblings.close()


@contextmanager
def silent(directory: Path, number: int) -> Iterator[None]:
    """A process that can be reached and never answers: a frozen one."""
    path = directory / f"sibling-{number}.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        yield


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for the second process, and for the others as long as it takes."""
    ask = Line._ask

    async def ask_hastily(self: Line, number: int, name: str, question: bytes, _: float) -> Any:
        return await ask(self, number, name, question, 0.1 if number == 2 else TIMEOUT_S)

    monkeypatch.setattr(Line, "_ask", ask_hastily)


@pytest.mark.usefixtures("_hasty")
async def test_a_call_that_may_be_where_nobody_answers_is_not_said_to_be_nowhere(
    tmp_path: Path,
) -> None:
    async with processes(tmp_path, 2) as (first, _):
        with silent(tmp_path, 2), pytest.raises(ServiceError, match="not answer") as caught:
            await first.siblings.abort("id", None)
        assert caught.value.kind is ErrorKind.UNHEALTHY


@pytest.mark.usefixtures("_hasty")
async def test_a_call_that_was_found_is_ended_whoever_else_is_silent(tmp_path: Path) -> None:
    async with processes(tmp_path, 3) as (first, _, third):
        with silent(tmp_path, 2):
            assert await first.siblings.abort("id", None) == 1
            assert await first.siblings.abort("id", None, 3) == 5
        assert third.aborted == 2 * [("id", None)]


@pytest.mark.parametrize("count", [1, 4])
async def test_an_engine_that_all_meet_is_reported_once(tmp_path: Path, count: int) -> None:
    async with processes(tmp_path, count) as all_of_them:
        for instance in ("one", "two"):
            claims = [process.siblings.claims_engine(instance) for process in all_of_them]
            assert sum(claims) == 1


async def test_only_our_own_user_can_ask(tmp_path: Path) -> None:
    async with processes(tmp_path, 2):
        modes = await asyncio.to_thread(_modes, tmp_path)
    assert modes == [0o600, 0o600]


def _modes(directory: Path) -> list[int]:
    return [path.stat().st_mode & 0o777 for path in directory.glob("*.sock")]
