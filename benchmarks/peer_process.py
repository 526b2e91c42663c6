"""Peers that are packages: installed once, each into an environment of its own, run as processes.

A worker reads one JSON list of [prompt, new_tokens] per line, and answers each with a line of JSON:
its seconds, and those until each token of each stream. It imports nothing of this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.llama_build import PeerAbsentError, cache_directory
from benchmarks.load import Item


@dataclass(frozen=True, slots=True)
class Package:
    """A package of a peer.

    Attributes:
        name: on the package index.
        version: of it.
        beside: requirements of what else its environment needs.
        without: packages that it would bring and that do not load there.
    """

    name: str
    version: str
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def home(self) -> Path:
        """Returns the environment that has the package, after installing it if it has not.

        Raises:
            PeerAbsentError: it cannot be installed.
        """
        home = cache_directory() / f"{self.name}-{self.version}"
        done = home / "installed"
        if not done.exists():
            print(f"installing {self.name} in {home}", file=sys.stderr, flush=True)
            wanted = [f"{self.name}=={self.version}", *self.beside]
            self.run(sys.executable, "-m", "venv", str(home))
            pip = (str(home / "bin" / "python"), "-m", "pip")
            self.run(*pip, "install", "-q", *wanted)
            if self.without:
                self.run(*pip, "uninstall", "-q", "-y", *self.without)
            done.touch()
        return home

    def run(self, *command: str) -> None:
        """Runs a command that prepares the peer.

        Raises:
            PeerAbsentError: it failed; the message has the end of its output.
        """
        try:
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise PeerAbsentError(f"{self.name}: {error}") from error
        if ended.returncode:
            said = " | ".join(ended.stderr.strip().splitlines()[-3:])
            raise PeerAbsentError(f"{self.name}, status {ended.returncode}: {said}")


@dataclass(frozen=True, slots=True)
class PeerRun:
    """The seconds of a load, and those of each stream's tokens, both since its start."""

    seconds: float
    arrivals: list[list[float]]

    @property
    def first(self) -> float:
        """Seconds to the first token of all."""
        return min(times[0] for times in self.arrivals)


class PeerProcess:
    """A worker that has loaded a model.

    Args:
        name: of the peer, for messages.
        process: the worker.
    """

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        """Wait until the worker is ready."""
        self._name = name
        self._process = process
        self._read()

    def run(self, items: Sequence[Item]) -> PeerRun:
        """Runs a load; the worker checks that all its tokens came.

        Raises:
            PeerAbsentError: the worker has ended.
        """
        pairs = [(item.prompt, item.new_tokens) for item in items]
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which reading tells
            self._process.stdin.write(json.dumps(pairs) + "\n")
            self._process.stdin.flush()
        return PeerRun(**json.loads(self._read()))

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerAbsentError(f"{self._name} ended with status {self._process.wait()}")
        return line


@contextmanager
def peer_process(
    name: str, command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[PeerProcess]:
    """Runs a worker for the length of a block.

    Raises:
        PeerAbsentError: it cannot load its model.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield PeerProcess(name, process)
    finally:
        process.kill()
        with suppress(BrokenPipeError):  # what it has not read
            process.communicate()
