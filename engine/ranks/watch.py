"""Why the ranks of an engine have to end, told from the signs of life that they give."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

SILENCE_S = 1.5  # after which a rank counts as frozen, and ranks without progress as stuck


class Signs:
    """What another rank has told of itself.

    Args:
        rank: its number.
        connection: by which it tells the seconds without progress, or why it ends.

    Attributes:
        quiet: the seconds without progress, as it said last.
        silence: the seconds since it said anything.
        reason: why it ends; empty if it has not said so.
    """

    def __init__(self, rank: int, connection: Connection) -> None:
        self.rank = rank
        self.quiet = self.silence = 0.0
        self.reason = ""
        self.has_ended = False
        self._connection = connection

    def read(self, elapsed: float) -> None:
        """Reads what it has said in the `elapsed` seconds since the last call."""
        self.silence += elapsed
        try:
            while self._connection.poll():
                sign = self._connection.recv()
                self.silence = 0.0
                if isinstance(sign, str):
                    self.reason = sign
                else:
                    self.quiet = sign
        except (EOFError, OSError):
            self.has_ended = True


def reason_to_end(others: Sequence[Signs], quiet: float | None, *, serving: bool) -> str:
    """Why the ranks have to end; empty if they need not.

    A rank may wait for another as long as that one gets on: only if none does, they are stuck.

    Args:
        others: the signs of all ranks but the first.
        quiet: the seconds without progress of the first; None where that is no sign of being
            stuck, since the device is at work.
        serving: whether all have loaded the model; before, any of them may be silent.
    """
    for signs in others:
        if signs.has_ended:
            return f"rank {signs.rank} has ended{signs.reason and f': {signs.reason}'}"
        if signs.reason:
            return f"rank {signs.rank}: {signs.reason}"
        if serving and signs.silence >= SILENCE_S:
            return f"rank {signs.rank} gives no sign of life"
    if not serving or quiet is None:
        return ""
    is_stuck = min(quiet, *(signs.quiet for signs in others)) >= SILENCE_S
    return "the ranks wait for each other" if is_stuck else ""
