"""Questions between service processes: gRPC over Unix sockets that only our own user can reach."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc import aio

from ..launch.place import Place

Answer = Callable[[bytes], Awaitable[bytes]]

_SERVICE = "tokenwire.Siblings"


@dataclass(frozen=True, slots=True)
class Answers:
    """What the others answer.

    Attributes:
        by_number: of the processes that have answered.
        silent: the numbers of those that run and have not answered in time. The rest is starting
            or gone: no calls are there.
    """

    by_number: dict[int, bytes]
    silent: frozenset[int]


class Line:
    """How a service process is asked by the others, and asks them.

    Args:
        place: of this process.
        answers: to questions, by their names.
    """

    def __init__(self, place: Place, answers: Mapping[str, Answer]) -> None:
        self._place = place
        self._server = aio.server()
        handlers = {name: _handler(answer) for name, answer in answers.items()}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, handlers),)
        )

    async def open(self) -> None:
        """Begins to answer."""
        path = _path(self._place, self._place.number)
        path.unlink(missing_ok=True)  # of a process that was killed
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(mask)
        await self._server.start()

    async def close(self) -> None:
        """Ends answering."""
        await self._server.stop(None)

    async def ask(self, name: str, question: bytes = b"", *, patience_s: float) -> Answers:
        """Asks all others at once.

        Args:
            name: of the question.
            question: what it is about.
            patience_s: with processes that do not answer, since they are frozen or very busy.
        """
        numbers = self._place.others
        asked = (self._ask(number, name, question, patience_s) for number in numbers)
        replies = dict(zip(numbers, await asyncio.gather(*asked), strict=True))
        return Answers(
            {number: reply for number, reply in replies.items() if isinstance(reply, bytes)},
            frozenset(n for n, r in replies.items() if r is grpc.StatusCode.DEADLINE_EXCEEDED),
        )

    async def _ask(
        self, number: int, name: str, question: bytes, patience_s: float
    ) -> bytes | grpc.StatusCode:
        """The answer of one of them, or why there is none."""
        async with aio.insecure_channel(f"unix:{_path(self._place, number)}") as channel:
            try:
                answer: bytes = await channel.unary_unary(f"/{_SERVICE}/{name}")(
                    question, timeout=patience_s
                )
            except aio.AioRpcError as error:
                return error.code()
        return answer


def _handler(answer: Answer) -> grpc.RpcMethodHandler:
    async def handle(question: bytes, _: aio.ServicerContext[bytes, bytes]) -> bytes:
        return await answer(question)

    return grpc.unary_unary_rpc_method_handler(handle)


def _path(place: Place, number: int) -> Path:
    return place.directory / f"sibling-{number}.sock"
