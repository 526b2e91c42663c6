"""Both clients behind one face, so that a test is written once and run with each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from tokenwire_client import AsyncClient, Client

from tests.service.fakes import TIMEOUT_S


class Caller:
    """A client of either kind: `call` awaits an answer, `collect` all messages of a stream."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    async def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        method = getattr(self.client, name)
        async with asyncio.timeout(TIMEOUT_S):
            if isinstance(self.client, AsyncClient):
                return await method(*arguments, **options)
            return await asyncio.to_thread(method, *arguments, **options)

    async def collect(self, name: str, *arguments: Any, **options: Any) -> list[Any]:
        replies = getattr(self.client, name)(*arguments, **options)
        async with asyncio.timeout(TIMEOUT_S):
            if isinstance(self.client, AsyncClient):
                return [reply async for reply in replies]
            return await asyncio.to_thread(list, replies)

    async def first(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The first message of a stream, which is then closed."""
        replies = getattr(self.client, name)(*arguments, **options)
        async with asyncio.timeout(TIMEOUT_S):
            if isinstance(self.client, AsyncClient):
                reply = await anext(replies)
                await replies.aclose()
            else:
                reply = await asyncio.to_thread(next, replies)
                await asyncio.to_thread(replies.close)
        return reply


@asynccontextmanager
async def calling(kind: type[Any], address: str, **options: Any) -> AsyncGenerator[Caller]:
    """A caller that is closed at the end."""
    client = kind(address, **options)
    try:
        yield Caller(client)
    finally:
        if isinstance(client, AsyncClient):
            await client.close()
        else:
            client.close()


KINDS = [Client, AsyncClient]
