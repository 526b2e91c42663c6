"""The times of one request."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from .transport import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The times of one request, in seconds of one clock.

    Latencies count from when it was due, not from when it was sent: a delay of the sender is part
    of what a user waits for (coordinated omission). In a closed loop it is due when it is sent.

    Attributes:
        due: when it should have been sent.
        sent: when it was sent.
        arrivals: when each token arrived.
        ended: when the answer was complete, or failed.
        failure: why it failed, if it did.
    """

    due: float
    sent: float
    arrivals: tuple[float, ...]
    ended: float
    failure: Failure | None = None

    @property
    def lateness(self) -> float:
        """Seconds from when it was due to when it was sent."""
        return self.sent - self.due

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.due

    @property
    def end_to_end(self) -> float:
        """Seconds to the end of the answer."""
        return self.ended - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in pairwise(self.arrivals)]
