"""The first rank: it starts the others, leads them through the steps, and ends with any of them.

Ranks that lost one another cannot go on: a collective that some have entered, and others have not,
never ends. So there is one engine or none. If a rank dies, freezes, or all wait for each other,
this process ends at once with all ranks; its supervisor then starts a new engine, and the service
resubmits its requests.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..batch.model_input import ModelInput
from ..build import Ranks
from ..executor import Forward
from ..heartbeat import Activity
from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from ..shards.group import join, open_store
from .adapters import AdapterLeader
from .follower import Place, exchange_kernels, follow, uses_gpu
from .plan_channel import PlanSender
from .watch import Signs, reason_to_end

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
_CAUSE_S = 0.5  # in which the watch sees that it is another rank that has ended
_OWN_WORDS_S = 2.0  # that this rank has to say itself why the model cannot be served


class Leader:
    """Starts the other ranks of an engine, and watches them until it is left as a context.

    Args:
        config: of the engine.
        activity: of this rank's step thread.

    Attributes:
        ranks: for `build_engine`.

    Raises:
        ModelLoadError: there are not as many GPUs as ranks.
    """

    def __init__(self, config: EngineConfig, activity: Activity) -> None:
        size = config.num_shards
        self._on_gpu = uses_gpu(config)
        if self._on_gpu and torch.cuda.device_count() < size:
            raise ModelLoadError(
                f"`num_shard` is {size}, and there are {torch.cuda.device_count()} GPUs"
            )
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._serving = False
        self._quiet = 0.0  # of this rank; written by its heartbeat
        self._others: list[tuple[BaseProcess, Signs]] = []
        meeting = _meeting(config)
        self._readers: list[Connection] = []
        plans = [self._start(config, rank, meeting) for rank in range(1, size)]
        activity.companions = frozenset(process_id for process_id, _ in plans)
        self._sender = PlanSender(plans)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        kernels = exchange_kernels(config)
        group = join(open_store(meeting, size), 0, size, on_gpu=self._on_gpu, kernels=kernels)
        self.ranks = Ranks(group, self._led, AdapterLeader(self._sender, self._readers))

    def begin_serving(self) -> None:
        """From now on a rank that is silent is frozen, and does not only load."""
        for _, signs in self._others:
            signs.silence = 0.0
        self._serving = True

    def heard(self, quiet: float) -> None:
        """Notes for how long this rank has made no progress, in seconds."""
        self._quiet = quiet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Ends the other ranks."""
        if kind is not None:  # the cause may be that one has ended, which the watch tells better
            self._closed.wait(_CAUSE_S)
        self._closed.set()
        for process, _ in self._others:
            process.kill()
            process.join()

    def _start(self, config: EngineConfig, rank: int, meeting: Path) -> tuple[int, Connection]:
        """Starts a rank; returns its process id, and where it is told what to compute."""
        context = multiprocessing.get_context("spawn")  # a fork would have threads' locks
        plans, their_plans = context.Pipe()
        reads, their_reads = context.Pipe()
        signs, their_signs = context.Pipe(duplex=False)
        root = logging.getLogger()
        place = Place(
            rank=rank,
            config=config,
            meeting=meeting,
            plans=their_plans,
            reads=their_reads,
            signs=their_signs,
            log_level=root.getEffectiveLevel(),
            formatter=next((handler.formatter for handler in root.handlers), None),
        )
        process = context.Process(target=follow, args=(place,), name=f"rank {rank}", daemon=True)
        process.start()
        for theirs in (their_plans, their_reads, their_signs):
            theirs.close()
        self._readers.append(reads)
        assert process.pid is not None
        self._others.append((process, Signs(rank, signs)))
        return process.pid, plans

    def _led(self, forward: Forward) -> Forward:
        """A forward pass that all ranks compute."""

        def led(batch: ModelInput) -> Tensor:
            try:
                self._sender.send(batch)
                return forward(batch)
            except Exception as error:
                self._closed.wait(_CAUSE_S)
                logger.exception("a step failed on the first rank")
                self._end(f"a step failed on the first rank: {error}")
                raise

        return led

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(_LOOK_S):
            now = time.monotonic()
            # A pause of this process, as of a container that is frozen, is no silence of others.
            elapsed, looked = min(now - looked, 2 * _LOOK_S), now
            others = [signs for _, signs in self._others]
            for signs in others:
                signs.read(elapsed)
            quiet = None if self._on_gpu else self._quiet
            if reason := reason_to_end(others, quiet, serving=self._serving):
                if not self._serving and any(signs.reason for signs in others):
                    self._closed.wait(_OWN_WORDS_S)
                self._end(reason)

    def _end(self, reason: str) -> None:
        """Ends all ranks, this one last."""
        with self._lock:  # the first reason is the one to tell
            if self._closed.is_set():
                return
            logger.critical("the engine ends with all its ranks: %s", reason)
            for process, _ in self._others:
                process.kill()
            os._exit(1)  # threads may be in a collective that never ends


def _meeting(config: EngineConfig) -> Path:
    """The file by which the ranks find each other, beside the socket, whose directory is private.

    One that a killed engine left is of ranks that are no more.
    """
    path = config.socket_path.with_name(f"{config.socket_path.name}.ranks")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path
