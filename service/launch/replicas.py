"""The engines of one server on one machine: their names, their sockets, and what each runs on.

Each engine has GPUs of its own, or a group of cores. A model that is divided takes as many of them
per engine as it has parts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.protocol.processors import AFFINITY, num_processors

from .settings import Settings

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEVICE_FILES = Path("/dev")
_SMI_TIMEOUT_S = 20.0  # without its daemon it wakes up each GPU first


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One engine.

    Attributes:
        name: of the child; the only engine has no number.
        settings: its own, of those of the server.
        environment: variables for it.
        processors: those that it may use; none for all.
    """

    name: str
    settings: Settings
    environment: Mapping[str, str] = field(default_factory=dict)
    processors: frozenset[int] = frozenset()


def make_replicas(settings: Settings, environment: Mapping[str, str] = os.environ) -> list[Replica]:
    """The engines of a server, given its environment.

    Raises:
        ValueError: there are not as many GPUs as they need.
    """
    if settings.replicas == 1:
        return [Replica(name="engine", settings=settings)]
    gpus = [] if settings.device == "cpu" else visible_gpus(environment)
    if gpus or settings.device == "cuda":
        return _on_gpus(settings, gpus)
    return _on_cores(settings, sorted(AFFINITY), num_processors())


def _numbered(settings: Settings) -> list[Replica]:
    return [
        Replica(name=f"engine-{number}", settings=replace(settings, engine_socket=path))
        for number, path in enumerate(settings.engine_sockets, start=1)
    ]


def _on_gpus(settings: Settings, gpus: Sequence[str]) -> list[Replica]:
    size = settings.num_shards
    if len(gpus) < settings.replicas * size:
        raise ValueError(
            f"`replicas` {settings.replicas} with {size} GPU{'s' * (size > 1)} each need "
            f"{settings.replicas * size} GPUs, and there are {len(gpus)}; "
            "--device cpu runs them on the CPU"
        )
    return [
        replace(one, environment={_VISIBLE: ",".join(gpus[index * size :][:size])})
        for index, one in enumerate(_numbered(settings))
    ]


def _on_cores(settings: Settings, cores: Sequence[int], num_usable: int) -> list[Replica]:
    """Engines with a group of cores each, where there are enough, or else a share of the threads.

    Under a quota of processor time cores are not the limit: a group would only be in the way.
    """
    count, size = settings.replicas, len(cores) // settings.replicas
    threads = settings.num_threads or max(1, num_usable // (count * settings.num_shards))
    has_groups = num_usable == len(cores) and threads * settings.num_shards <= size
    return [
        replace(
            one,
            settings=replace(one.settings, num_threads=threads),
            processors=frozenset(cores[index * size :][:size]) if has_groups else frozenset(),
        )
        for index, one in enumerate(_numbered(settings))
    ]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that engines may use, as CUDA names them."""
    given = environment.get(_VISIBLE)
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        return [name for name in names if name not in ("", "-1")]
    files = [path for path in _DEVICE_FILES.glob("nvidia*") if path.name[6:].isdigit()]
    return [str(index) for index in range(len(files) or _num_listed())]


def _num_listed() -> int:
    """How many GPUs the driver's tool lists, where there are no device files, as in WSL."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    try:
        listed = subprocess.run(  # noqa: S603  a fixed argument
            [command, "-L"], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU") for line in listed.stdout.splitlines())
