"""OpenVINO GenAI as a peer: installed once into an environment of its own, run as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.llama_build import PeerAbsentError, cache_directory
from benchmarks.load import Item

VERSION = "2026.4.1.0"  # of openvino-genai
_WORKER = Path(__file__).with_name("openvino_worker.py")


def python() -> Path:
    """Returns the Python that has the package, after installing it if it is not there.

    Raises:
        PeerAbsentError: it cannot be installed.
    """
    home = cache_directory() / f"openvino-genai-{VERSION}"
    found, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            install = [str(found), "-m", "pip", "install", "-q", f"openvino-genai=={VERSION}"]
            subprocess.run(install, check=True, stdout=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PeerAbsentError(f"OpenVINO GenAI cannot be installed: {error}") from error
        done.touch()
    return found


class OpenVino:
    """A worker that has loaded a model."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Wait until the worker is ready."""
        self._process = process
        self._read()

    def run(self, items: Sequence[Item]) -> tuple[float, float]:
        """Seconds of a load, and to its first token.

        Raises:
            PeerAbsentError: the worker has ended.
        """
        pairs = [(item.prompt, item.new_tokens) for item in items]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(pairs) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._read())
        return answer["seconds"], answer["first"]

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerAbsentError(f"OpenVINO GenAI ended with status {self._process.wait()}")
        return line


@contextmanager
def openvino(
    model: Path, precision: str, threads: int, environment: Mapping[str, str]
) -> Iterator[OpenVino]:
    """Loads a GGUF file; it computes in a precision of OpenVINO's: f32, f16 or bf16."""
    command = [str(python()), str(_WORKER), str(model), precision, str(threads)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield OpenVino(process)
        finally:
            process.kill()
