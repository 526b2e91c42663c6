"""How long `tokenwire serve` takes until it is ready, and which of its stages take it.

Starts the server again and again, with the kernels built before and, once, with none built. The
time is that from the start of the command to its line that it is ready.

    .venv/bin/python -m benchmarks.starting
    .venv/bin/python -m benchmarks.starting --model-id model.gguf

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

from benchmarks import machine
from benchmarks.report import Target, last_line, table
from service.launch.settings import BUNDLED_MODEL

_GOAL_S = 5.0
_READY = "Tokenwire is ready."
# Seconds in lines of the log, by what they are of.
_STAGES = {
    "imports of the engine": re.compile(r"imports ([\d.]+) s"),
    "model": re.compile(r"model ([\d.]+) s\)"),
}


@dataclass(frozen=True, slots=True)
class Start:
    """One start, in seconds.

    Attributes:
        ready: from the command to its line that it is ready.
        stages: what the log says, by the names of the stages.
    """

    ready: float
    stages: dict[str, float]


def start(model_id: str, cache: str | None = None) -> Start:
    """Starts a server and stops it when it is ready.

    Args:
        model_id: what it serves.
        cache: the directory of built kernels; None for the user's own.

    Raises:
        RuntimeError: it ends before it is ready.
    """
    command = [sys.executable, "-m", "service.cli", "serve", "--port=0", "--grpc-port=0"]
    environment = {**os.environ, **({} if cache is None else {"XDG_CACHE_HOME": cache})}
    began, stages = time.monotonic(), dict[str, float]()
    with subprocess.Popen(
        [*command, f"--model-id={model_id}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if _READY in line:
                    return Start(time.monotonic() - began, stages)
                found = {name: stage.search(line) for name, stage in _STAGES.items()}
                stages |= {name: float(match[1]) for name, match in found.items() if match}
        finally:
            server.send_signal(signal.SIGTERM)
            server.stdout.read()
    raise RuntimeError(f"it ended with status {server.returncode} and was not ready")


def main() -> None:
    """Runs the starts and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-id", default=BUNDLED_MODEL)
    parser.add_argument("--repeat", type=int, default=5, help="starts with built kernels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        cold = start(options.model_id, cache)
    warm = [start(options.model_id) for _ in range(options.repeat)]
    names = ["ready", *_STAGES]
    rows = [_row("kernels not built", [cold]), _row(f"median of {len(warm)}", warm)]
    print(table(["seconds", *names], rows))
    median = statistics.median(item.ready for item in warm)
    target = Target("time until ready, by the goal of 5 s", median / _GOAL_S, 1.0, at_least=False)
    print(" ".join(target.cells()))
    result = {"model_id": options.model_id, "cold": asdict(cold), "warm": list(map(asdict, warm))}
    print(last_line({"machine": machine.describe(), **result}, [target]))


def _row(name: str, starts: list[Start]) -> list[str]:
    """Medians of starts."""
    times = [[item.ready for item in starts]]
    times += [[item.stages.get(stage, 0.0) for item in starts] for stage in _STAGES]
    return [name, *(f"{statistics.median(values):.1f}" for values in times)]


if __name__ == "__main__":
    main()
