"""Two ranks for many tests: this process, and one that computes each engine's other half."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.batch import ModelInput
from engine.build import Ranks, build_computation, build_engine
from engine.engine import Engine
from engine.executor import Forward
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.ranks.plan_channel import PlanReceiver, PlanSender
from engine.shards.group import Group, join, open_store


@dataclass(frozen=True)
class Pair:
    """The first of two ranks, and its connections to the other one."""

    group: Group
    process: SpawnProcess
    commands: Connection
    plans: Connection

    def build(self, config: EngineConfig) -> Engine:
        """An engine over both ranks; the one before it ends."""
        self.commands.send(replace(config, num_shards=2, num_threads=1))
        assert self.process.pid is not None
        sender = PlanSender([(self.process.pid, self.plans)])

        def lead(forward: Forward) -> Forward:
            def led(batch: ModelInput) -> Tensor:
                sender.send(batch)
                return forward(batch)

            return led

        config = replace(config, num_shards=2, num_threads=1)
        return build_engine(config, ranks=Ranks(self.group, lead))[0]


@contextmanager
def two_ranks(meeting: Path) -> Iterator[Pair]:
    """Starts the other rank, which is met by a file; ends it afterwards."""
    context = multiprocessing.get_context("spawn")
    commands, their_commands = context.Pipe()
    plans, their_plans = context.Pipe()
    process = context.Process(target=_other, args=(meeting, their_commands, their_plans))
    process.start()
    try:
        yield Pair(join(open_store(meeting, 2), 0, 2, on_gpu=False), process, commands, plans)
    finally:
        process.kill()
        process.join()
        dist.destroy_process_group()


def _other(meeting: Path, commands: Connection, plans: Connection) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    group = join(open_store(meeting, 2), 1, 2, on_gpu=False)
    while True:
        try:
            forward = build_computation(commands.recv(), group=group).forward
        except ModelLoadError:  # the first rank says so
            continue
        receiver = PlanReceiver(plans, torch.device("cpu"))
        while not commands.poll():
            batch = receiver.receive(0.02)
            if batch is not None:
                forward(batch)
