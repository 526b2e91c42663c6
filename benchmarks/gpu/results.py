"""The file with a script's results: what was measured, on which device, with which versions."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.random_engine import release
from engine.cuda_segments import VARIABLE

DIRECTORY = Path(__file__).parents[1] / "results"
_LIMIT_S = 570.0  # of a script: a machine may be lent for ten minutes at a time
_PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "vllm", "sglang", "flash-attn", "flash-attn-3"),
    *("flashinfer-python", "accelerate", "llguidance", "grpcio", "compressed-tensors"),
)
_SMI_FIELDS = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"


def arguments(description: str, argv: list[str] | None, **choices: list[str]) -> argparse.Namespace:
    """The arguments that all scripts have; `only` names parts if there are any to choose from.

    Raises:
        SystemExit: there is no GPU, and the run would pretend that there is one.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only whether it runs")
    parser.add_argument("--results", type=Path, default=DIRECTORY, help="where the file goes")
    parser.add_argument("--limit-s", type=float, default=_LIMIT_S, help="for the whole script")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    found = parser.parse_args(argv)
    if found.device == "cpu" and not found.smoke:
        parser.error("on a CPU there is nothing to measure here: add --smoke to see that it runs")
    if found.device == "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: no kernel would run on the GPU")
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --smoke --device cpu shows that the script runs")
    return found


class Results:
    """What a script has found so far, in a file that is written again after each part.

    Args:
        step: the script's name.
        found: its arguments.
    """

    def __init__(self, step: str, found: argparse.Namespace) -> None:
        self.device = torch.device(found.device)
        self.parts: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self._started = time.monotonic()
        self._limit_s = found.limit_s
        self._head = {
            "step": step,
            "measured_on": _label(found, self.device),
            "is_smoke": found.smoke,
            "command": " ".join(sys.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": _output("git", "-C", str(DIRECTORY.parent), "rev-parse", "HEAD"),
            "gpu": _gpu(self.device),
            "machine": machine.describe(self.device),
            "versions": _versions(),
            "allocator": os.environ.get(VARIABLE),
        }
        slug = "-".join(str(self._head["measured_on"]).lower().split())
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self.path = found.results / f"{stamp}-{slug}-{step}.json"
        found.results.mkdir(parents=True, exist_ok=True)
        print(f"{step}: {self._head['measured_on']}, {machine.line(machine.describe(self.device))}")

    @property
    def left_s(self) -> float:
        """Seconds until the script should end."""
        return self._limit_s - (time.monotonic() - self._started)

    def note(self, part: str, value: Any) -> None:
        """Keeps the result of a part, and writes the file."""
        self.parts[part] = value
        self.save()

    def fail(self, part: str, reason: str) -> None:
        """Keeps why a part has no result, and writes the file."""
        self.errors[part] = reason[:1000]
        print(f"FAILED: {part}: {reason[:300]}", flush=True)
        self.save()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose error is kept, so that the next part runs; memory is free after it."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(name, f"{type(error).__name__}: {error}")
            traceback.clear_frames(error.__traceback__)  # whose frames hold tensors
        release(self.device)
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)

    def run(self, parts: dict[str, Callable[[], Any]]) -> None:
        """Runs parts while there is time, and keeps what each returns."""
        for name, compute in parts.items():
            if self.left_s < 0:
                self.fail(name, "not run: no time left")
                continue
            with self.part(name):
                self.note(name, compute())

    def save(self) -> None:
        """Writes the file as a whole: whoever reads it never sees half of it."""
        seconds = round(time.monotonic() - self._started, 1)
        found = {**self._head, "seconds": seconds, "parts": self.parts, "errors": self.errors}
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        unfinished.replace(self.path)

    def finish(self) -> int:
        """Writes the file, says where it is, and returns the exit status."""
        self.save()
        print(f"results: {self.path}")
        for part, reason in self.errors.items():
            print(f"FAILED: {part}: {reason.splitlines()[0]}")
        return 1 if self.errors else 0


def _label(found: argparse.Namespace, device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu smoke"
    name = torch.cuda.get_device_name(device)
    return f"{name} smoke" if found.smoke else name


def _gpu(device: torch.device) -> dict[str, Any] | None:
    """The GPU as its driver describes it; None on a CPU."""
    if device.type != "cuda":
        return None
    values = _output("nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader") or ""
    first = values.splitlines()[0].split(",") if values else []
    told = dict(zip(_SMI_FIELDS.split(","), (value.strip() for value in first), strict=False))
    properties = torch.cuda.get_device_properties(device)
    return {
        **told,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": properties.multi_processor_count,
        "cuda_of_torch": torch.version.cuda,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str | None:
    """What a command prints; None if it cannot be run."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()
