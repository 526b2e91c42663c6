"""A rank that is not the first: it computes what the first one tells it, and samples nothing."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from ..heartbeat import Activity, Heartbeat, Phase
from ..lean_imports import lean_imports
from ..library_pages import give_back_library_pages
from ..protocol.c_heap import limit_arenas
from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from ..protocol.notify import VARIABLE as NOTIFY_SOCKET

if TYPE_CHECKING:
    from ..kernels.cpu import CpuKernels

logger = logging.getLogger(__name__)

_LOOK_S = 0.25  # how often a rank that waits for a plan shows that it does


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a rank is started with.

    Attributes:
        rank: its number, from 1.
        config: of the engine.
        meeting: the file by which the ranks find each other.
        plans: where it is told what to compute.
        reads: where it is told which adapters to read.
        signs: where it tells that it gets on: seconds without progress, or why it ends.
        log_level: the least that it logs.
        formatter: of its log lines.
    """

    rank: int
    config: EngineConfig
    meeting: Path
    plans: Connection
    reads: Connection
    signs: Connection
    log_level: int
    formatter: logging.Formatter | None


def follow(place: Place) -> None:
    """Computes a rank's part until the first rank ends. It is the main function of a process."""
    os.environ.pop(NOTIFY_SOCKET, None)  # its supervisor is the first rank
    os.environ["TQDM_DISABLE"] = "1"
    limit_arenas()
    # Whoever ends a group of processes means the first rank, which ends this one when it is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _set_up_logging(place)
    activity = Activity()
    heartbeat = Heartbeat(activity)
    heartbeat.listeners.append(lambda quiet: _tell(place.signs, quiet))
    heartbeat.start()
    try:
        _compute(place, activity)
    except (EOFError, ConnectionError):
        os._exit(0)
    except ModelLoadError as error:
        _tell(place.signs, str(error))
    except Exception as error:
        logger.exception("a step failed")
        _tell(place.signs, str(error) or type(error).__name__)
    os._exit(1)  # what the others do together with this rank cannot be ended in any order


def _compute(place: Place, activity: Activity) -> None:
    with lean_imports(is_divided=True):
        # Here: it takes seconds, and the heart beats by now.
        from ..computation.computation import build_computation
    from ..shards.group import join, open_store
    from .part import Part

    size = place.config.num_shards
    store = open_store(place.meeting, size)
    kernels = exchange_kernels(place.config)
    group = join(store, place.rank, size, on_gpu=uses_gpu(place.config), kernels=kernels)
    built = build_computation(place.config, group=group)
    give_back_library_pages()
    part = Part(built, group, place.plans, place.reads)
    while True:
        activity.begin(Phase.WAITING_FOR_REQUESTS)
        wanted = part.receive(_LOOK_S)
        if wanted is not None:
            activity.begin(Phase.COMPUTING)
            part.do(wanted)


def uses_gpu(config: EngineConfig) -> bool:
    """Whether the ranks compute on GPUs."""
    import torch

    return config.device == "cuda" or (config.device is None and torch.cuda.is_available())


def exchange_kernels(config: EngineConfig) -> CpuKernels | None:
    """What ranks exchange results by on the host; None for GPUs, or where it is switched off."""
    from ..kernels import cpu

    if not config.enable_native_kernels or uses_gpu(config):
        return None
    return cpu.load()


def _tell(signs: Connection, sign: float | str) -> None:
    try:
        signs.send(sign)
    except OSError:  # the first rank has ended, and with it the engine
        os._exit(1)


def _set_up_logging(place: Place) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(place.formatter)
    handler.addFilter(lambda record: _with_rank(record, place.rank))
    # What is worth knowing of a start the first rank logs.
    level = place.log_level if place.log_level < logging.INFO else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _with_rank(record: logging.LogRecord, rank: int) -> bool:
    record.msg, record.args = f"rank {rank}: {record.getMessage()}", ()
    return True
