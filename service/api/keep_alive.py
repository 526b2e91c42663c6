"""Keeps silent streams alive: proxies and clients close a connection after a long silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any


class KeepAlive:
    """Sends a filler whenever a stream has sent nothing for a while.

    It costs a message nothing: its timer does not begin anew with each.

    Args:
        send: sends the filler.
        silent_since: when the last message was sent, in seconds of the event loop's clock; None
            while one is being sent.
        interval_s: how long a stream may be silent, in seconds.

    Attributes:
        sending: a filler that is being sent. No message can be sent at the same time.
    """

    def __init__(
        self,
        send: Callable[[], Coroutine[Any, Any, None]],
        silent_since: Callable[[], float | None],
        interval_s: float,
    ) -> None:
        self._send = send
        self._silent_since = silent_since
        self._interval_s = interval_s
        self.sending: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(interval_s, self._look)

    async def close(self) -> None:
        """Sends no more."""
        self._timer.cancel()
        if self.sending is not None:
            self.sending.cancel()
            with suppress(asyncio.CancelledError):
                await self.sending

    def _look(self) -> None:
        """Sends the filler if it is time for it, and looks again when it may be."""
        now, since = self._loop.time(), self._silent_since()
        due = now if since is None else since + self._interval_s
        if since is not None and now >= due and self.sending is None:
            self.sending = asyncio.create_task(self._fill())
        self._timer = self._loop.call_at(due if due > now else now + self._interval_s, self._look)

    async def _fill(self) -> None:
        try:
            with suppress(Exception):  # the next message meets the same, and says so
                await self._send()
        finally:
            self.sending = None
