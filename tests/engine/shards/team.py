"""Ranks for many tests: this process, and others that compute their parts of each engine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.batch.model_input import ModelInput
from engine.build import Ranks, build_computation, build_engine
from engine.engine import Engine
from engine.executor import Forward
from engine.kernels import cpu as cpu_kernels
from engine.protocol.config import EngineConfig, EngineInfo
from engine.protocol.errors import ModelLoadError
from engine.ranks.adapters import AdapterLeader
from engine.ranks.part import Part
from engine.ranks.plan_channel import PlanSender
from engine.shards.group import Group, join, open_store


@dataclass(frozen=True)
class Rank:
    """Another rank than the first, and the connection to it."""

    process: SpawnProcess
    commands: Connection


@dataclass(frozen=True)
class Team:
    """The first of several ranks, and the others."""

    group: Group
    others: list[Rank]

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
            assert rank.process.pid is not None
            channels.append((rank.process.pid, plans))
            reads.append(own_reads)
        sender = PlanSender(channels)

        def lead(forward: Forward) -> Forward:
            def led(batch: ModelInput) -> Tensor:
                sender.send(batch)
                return forward(batch)

            return led

        adapters = AdapterLeader(sender, reads)
        return build_engine(config, ranks=Ranks(self.group, lead, adapters))


@contextmanager
def team(meeting: Path, size: int) -> Iterator[Team]:
    """Starts the other ranks, which meet in a file; ends them afterwards."""
    others = [_start(meeting, number, size) for number in range(1, size)]
    try:
        yield Team(_join(meeting, 0, size), others)
    finally:
        for rank in others:
            rank.process.kill()
            rank.process.join()
        dist.destroy_process_group()


def _start(meeting: Path, number: int, size: int) -> Rank:
    context = multiprocessing.get_context("spawn")
    commands, their_commands = context.Pipe()
    arguments = (meeting, number, size, their_commands)
    process = context.Process(target=_compute, args=arguments)
    process.start()
    return Rank(process, commands)


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
        except ModelLoadError:  # the first rank says so
            continue
        part = Part(built, group, plans, reads)
        with suppress(EOFError, ConnectionError):  # the engine is no more
            while not commands.poll():
                wanted = part.receive(0.02)
                if wanted is not None:
                    part.do(wanted)
