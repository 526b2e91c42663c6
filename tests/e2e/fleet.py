"""Several servers on this machine: real services, each with an engine that has no model.

An engine gives each of its requests a token at every tick of a clock, so that three servers start
in a few seconds. Answers name the server that they come from, as the model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.local_server import free_port
from service.launch.servers import Address
from service.launch.sources import without_settings
from tests.e2e.stack import DEADLINE_S
from tests.paths import DEMO_MODEL, REPOSITORY

_TICK_S = 0.02
_VOCAB_SIZE = 4096  # of the bundled model, whose tokenizer the services have


class Server:
    """A service and its engine, which die and freeze together.

    Args:
        directory: for its files.
        name: of the server.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.model = directory / name
        self.model.symlink_to(DEMO_MODEL)
        self.address = Address("127.0.0.1", free_port())
        self._socket = directory / f"{name}.sock"
        self._log = directory / f"{name}.log"
        self.start()

    @property
    def name(self) -> str:
        """The model of its answers."""
        return str(self.model)

    def start(self) -> None:
        """Starts it, again at the address that it had before."""
        self._processes = [
            self._run("benchmarks.echo_engine", self._socket, _TICK_S, _VOCAB_SIZE),
            self._run(
                "service.cli",
                "service",
                f"--model-id={self.model}",
                f"--engine-socket={self._socket}",
                f"--gateway-port={self.address.port}",
                "--grpc-port=0",
                "--drain-seconds=0.2",
            ),
        ]

    def log(self) -> str:
        """The output of its service and its engine."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """Ends it as a machine does that loses its power."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(DEADLINE_S)

    def terminate(self) -> None:
        """Asks it to end, and waits for that."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait(DEADLINE_S)

    def freeze(self) -> None:
        """Lets it keep its connections and do nothing."""
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT)

    def _run(self, module: str, *arguments: object) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                cwd=REPOSITORY,
                env=without_settings(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
