"""Ranks for many tests: this process, and others that compute their parts of each engine.

A rank that others have left waits for them for ever, where no time limit of a test reaches. So this
process ends with any other, and if another rank alone cannot build an engine.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.batch.model_input import ModelInput
from engine.build import Ranks, build_engine
from engine.computation.computation import build_computation
from engine.engine import Engine
from engine.executor import Forward
from engine.kernels import cpu as cpu_kernels
from engine.protocol.config import EngineConfig, EngineInfo
from engine.protocol.errors import ModelLoadError
from engine.ranks.adapters import AdapterLeader
from engine.ranks.part import Part
from engine.ranks.plan_channel import PlanSender
from engine.shards.group import Group, join, open_store

_ALONE_S = 60.0  # that this rank has to fail to build an engine as another one has


@dataclass(frozen=True)
class Rank:
    """Another rank than the first, and the connection to it."""

    process: SpawnProcess
    commands: Connection
    pytestconfig: pytest.Config  # by whose leave it can be said why this process ends

    def watch(self, is_over: threading.Event) -> None:
        """Ends this process if the rank's ends before all is over."""
        wait([self.process.sentinel])
        self.process.join(1.0)
        if not is_over.is_set():
            self._end(f"a rank has ended: {self.process.exitcode}")

    def await_build(self, is_over: threading.Event) -> None:
        """Ends this process if the rank cannot build an engine, and this one goes on with it."""
        try:
            reason = self.commands.recv()
        except EOFError:  # it has ended, which is watched
            return
        if reason and not is_over.wait(_ALONE_S):
            self._end(f"a rank alone cannot build the engine: {reason}")

    def _end(self, reason: str) -> None:
        capture = self.pytestconfig.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture()
        print(reason, file=sys.__stderr__, flush=True)
        os._exit(1)


@dataclass(frozen=True)
class Team:
    """The first of several ranks, and the others."""

    group: Group
    others: list[Rank]
    is_over: threading.Event  # from when on the other ranks may end

    def end(self) -> None:
        """Ends the other ranks."""
        _end(self.others, self.is_over)

    def build(self, config: EngineConfig) -> Engine:
        """An engine over all ranks; the one before it ends."""
        return self.build_described(config)[0]

    def build_described(self, config: EngineConfig) -> tuple[Engine, EngineInfo]:
        """The same, and what it says of itself."""
        config = replace(config, num_shards=self.group.size, num_threads=1)
        channels, reads = [], []
        for rank in self.others:
            plans, their_plans = multiprocessing.Pipe()
            own_reads, their_reads = multiprocessing.Pipe()
            rank.commands.send((config, their_plans, their_reads))
            their_plans.close()  # else it would take messages for a rank that has ended
            their_reads.close()
            assert rank.process.pid is not None
            channels.append((rank.process.pid, plans))
            reads.append(own_reads)
        sender = PlanSender(channels)

        def lead(forward: Forward) -> Forward:
            def led(batch: ModelInput) -> Tensor:
                try:
                    sender.send(batch)
                    return forward(batch)
                except BaseException:  # the others wait in the midst of a step
                    self.end()
                    raise

            return led

        adapters = AdapterLeader(sender, reads)
        with self._all_build():
            return build_engine(config, ranks=Ranks(self.group, lead, adapters))

    @contextmanager
    def _all_build(self) -> Iterator[None]:
        """In which all ranks build an engine, or none."""
        is_over = threading.Event()
        threads = [
            threading.Thread(target=rank.await_build, args=(is_over,), daemon=True)
            for rank in self.others
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            for thread in threads:
                thread.join()


@contextmanager
def team(pytestconfig: pytest.Config, meeting: Path, size: int) -> Iterator[Team]:
    """Starts the other ranks, which meet in a file; ends them afterwards."""
    others = [_start(pytestconfig, meeting, number, size) for number in range(1, size)]
    is_over = threading.Event()
    for rank in others:
        threading.Thread(target=rank.watch, args=(is_over,), daemon=True).start()
    try:
        yield Team(_join(meeting, 0, size), others, is_over)
    finally:
        _end(others, is_over)
        dist.destroy_process_group()


def _end(others: list[Rank], is_over: threading.Event) -> None:
    is_over.set()
    for rank in others:
        rank.process.kill()
        rank.process.join()


def _start(pytestconfig: pytest.Config, meeting: Path, number: int, size: int) -> Rank:
    context = multiprocessing.get_context("spawn")
    commands, their_commands = context.Pipe()
    arguments = (meeting, number, size, their_commands)
    process = context.Process(target=_compute, args=arguments)
    process.start()
    their_commands.close()
    return Rank(process, commands, pytestconfig)


def _join(meeting: Path, number: int, size: int) -> Group:
    return join(open_store(meeting, size), number, size, on_gpu=False, kernels=cpu_kernels.load())


def _compute(meeting: Path, number: int, size: int, commands: Connection) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    group = _join(meeting, number, size)
    while True:
        try:
            config, plans, reads = commands.recv()
            built = build_computation(config, group=group)
        except ModelLoadError as error:  # the first rank says so, too
            commands.send(str(error))
            continue
        commands.send("")
        part = Part(built, group, plans, reads)
        with suppress(EOFError, ConnectionError):  # the engine is no more
            while not commands.poll():
                wanted = part.receive(0.02)
                if wanted is not None:
                    part.do(wanted)
