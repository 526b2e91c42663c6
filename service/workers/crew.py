"""Several processes of one module, which work for all callers in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from engine.protocol.wire import framed

from .process import WorkerProcess
from .turns import Turns


class Crew:
    """The processes.

    Args:
        module: what they run.
        setup: what they are told at their start.
        max_bytes: of the address space of each.
        num_workers: number of processes.
    """

    def __init__(self, module: str, setup: list[Any], *, max_bytes: int, num_workers: int) -> None:
        packed = framed(setup)
        self._all = [WorkerProcess.of_module(module, max_bytes, packed) for _ in range(num_workers)]
        self._idle = list(self._all)
        self._turns = Turns(num_workers)

    async def start(self) -> None:
        """Starts the processes, so that the first request does not wait for it."""
        for _ in self._all:
            async with self.worker() as worker:
                await worker.start()

    async def close(self) -> None:
        """Ends the processes."""
        await asyncio.gather(*(worker.stop() for worker in self._all))

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[WorkerProcess]:
        """One of them to the end of a block, once it is the current caller's turn."""
        async with self._turns.place():
            worker = self._idle.pop(0)
            try:
                yield worker
            finally:
                self._idle.append(worker)
