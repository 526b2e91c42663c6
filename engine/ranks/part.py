"""What a rank that is not the first does, order by order."""

from __future__ import annotations

from multiprocessing.connection import Connection

from ..batch.model_input import ModelInput
from ..computation.computation import Computation
from ..shards.group import Group
from ..shards.shared_forward import SharedForward
from .adapters import AdapterFollower
from .plan_channel import Order, PlanReceiver


class Part:
    """A rank's part of the model, and of its adapters.

    Args:
        built: computes it.
        group: the ranks.
        plans: where it is told what to compute.
        reads: where it is told which adapters to read.
    """

    def __init__(
        self, built: Computation, group: Group, plans: Connection, reads: Connection
    ) -> None:
        device = built.model.loaded.device
        self._forward = SharedForward(built.forward, group, device)
        self._receiver = PlanReceiver(plans)
        self._adapters: AdapterFollower | None = None
        if built.adapters is not None:
            self._adapters = AdapterFollower(built.adapters, self._receiver, reads)

    def receive(self, timeout: float) -> ModelInput | Order | None:
        """What to do next; None if there is nothing for `timeout` seconds.

        Raises:
            EOFError: the first rank has ended.
        """
        return self._receiver.receive(timeout)

    def do(self, wanted: ModelInput | Order) -> None:
        """Does it."""
        if isinstance(wanted, ModelInput):
            self._forward(wanted)
        elif self._adapters is not None:
            self._adapters.obey(wanted)
