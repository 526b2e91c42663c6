"""When sequences were started, preempted and so on, noted until a step's output takes it along."""

from __future__ import annotations

import time

from ..protocol.request import Moment, MomentKind


class Moments:
    """What happened since the last step's output: a few entries per request, none per token."""

    def __init__(self) -> None:
        self._noted: list[Moment] = []

    def note(self, request_id: str, kind: MomentKind) -> None:
        """Something happens to a request now."""
        self._noted.append(Moment(request_id, kind, time.monotonic()))

    def take(self) -> tuple[Moment, ...]:
        """All that was noted since this was called last."""
        if not self._noted:
            return ()
        taken, self._noted = tuple(self._noted), []
        return taken
