"""A fake server in a process of its own, which can be killed and frozen.

`python -m tests.envoy.fake_server NAME [PORT]` prints its port. It answers calls with its name, and
streams do not end.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

from tests.envoy.fake_service import DEADLINE, FakeService, Messages
from tests.paths import REPOSITORY

_PAUSE_S = 0.02  # of an answer, and between two messages of a stream


class FakeServer:
    """The process, and its port."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.start()

    def start(self) -> None:
        """Starts it, again on the port that it had before."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.envoy.fake_server", self.name, str(self.port)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for_port(self) -> None:
        """Returns once it listens."""
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        """Ends it as a machine does that loses its power."""
        self.process.kill()
        self.process.wait(DEADLINE)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def freeze(self) -> None:
        """Lets it keep its connections and do nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        self.process.send_signal(signal.SIGCONT)


def main(name: str, port: int) -> None:
    """Runs until it is killed."""
    service = FakeService(Messages(), port)
    service.reset()
    one = service.messages.reply("Generate", name.encode())
    piece = service.messages.reply("GenerateStream", name.encode(), "text/event-stream")

    async def generate(_request: Any, _context: Any) -> Any:
        await asyncio.sleep(_PAUSE_S)
        return one

    async def stream(_request: Any, _context: Any) -> AsyncIterator[Any]:
        while True:
            yield piece
            await asyncio.sleep(_PAUSE_S)

    service.behave("Generate", generate)
    service.behave("GenerateStream", stream)
    sys.stdout.write(f"{service.port}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
