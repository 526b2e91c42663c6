"""Questions between service processes: gRPC over Unix sockets that only our own user can reach."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import grpc
from grpc import aio

from ..launch.place import Place

Answer = Callable[[bytes], Awaitable[bytes]]

_SERVICE = "tokenwire.Siblings"
_PATIENCE_S = 1.0  # with a process that may be frozen


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

    async def ask(self, name: str, question: bytes = b"") -> dict[int, bytes]:
        """The answers of the others, by their numbers; without those that do not answer in time."""
        numbers = self._place.others
        answers = await asyncio.gather(*(self._ask(number, name, question) for number in numbers))
        pairs = zip(numbers, answers, strict=True)
        return {number: answer for number, answer in pairs if answer is not None}

    async def _ask(self, number: int, name: str, question: bytes) -> bytes | None:
        async with aio.insecure_channel(f"unix:{_path(self._place, number)}") as channel:
            try:
                answer: bytes = await channel.unary_unary(f"/{_SERVICE}/{name}")(
                    question, timeout=_PATIENCE_S
                )
            except aio.AioRpcError:  # it is starting, frozen, or just gone
                return None
        return answer


def _handler(answer: Answer) -> grpc.RpcMethodHandler:
    async def handle(question: bytes, _: aio.ServicerContext[bytes, bytes]) -> bytes:
        return await answer(question)

    return grpc.unary_unary_rpc_method_handler(handle)


def _path(place: Place, number: int) -> Path:
    return place.directory / f"sibling-{number}.sock"
