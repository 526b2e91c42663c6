"""Between two parts of long work everything runs that has become due."""

from __future__ import annotations

import asyncio
import socket

from service.workers.pause import pause


async def test_what_comes_in_during_a_part_is_handled_before_the_next() -> None:
    loop, handled = asyncio.get_running_loop(), list[bytes]()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop.add_reader(ours, lambda: handled.append(ours.recv(1)))
        theirs.send(b"x")  # while this task runs
        await pause()
        assert handled == [b"x"]
        loop.remove_reader(ours)
