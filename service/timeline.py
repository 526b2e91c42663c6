"""When a call passed its stages, in seconds of the monotonic clock: for log lines and traces."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine.protocol.request import Moment, MomentKind


@dataclass(slots=True)
class Stage:
    """A stage of a request before the engine has it: `validate` or `grammar`.

    Attributes:
        name: of the stage.
        began: when it began.
        ended: when it ended; None as long as it has not.
        has_failed: whether it ended with an error.
    """

    name: str
    began: float
    ended: float | None = None
    has_failed: bool = False


@dataclass(slots=True)
class SequenceTimeline:
    """What happened to one text that the engine generates.

    Attributes:
        submitted: when it was sent to the engine.
        started: when the engine began its first step.
        first_token: when its first token was computed.
        finished: when the engine had its last token.
        ended: when nobody waited for it any more.
        events: what else happened: `preempted`, `engine_lost` and `resumed`.
    """

    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None
    ended: float | None = None
    events: list[tuple[str, float]] = field(default_factory=list)

    def note(self, moment: Moment) -> None:
        """Adds something that the engine tells."""
        match moment.kind:
            case MomentKind.STARTED if self.started is None:
                self.started = moment.at
            case MomentKind.STARTED | MomentKind.RESUMED:  # by a new engine, or by the same
                self.events.append(("resumed", moment.at))
            case MomentKind.PREEMPTED:
                self.events.append(("preempted", moment.at))
            case MomentKind.FIRST_TOKEN if self.first_token is None:
                self.first_token = moment.at
            case MomentKind.FINISHED:
                self.finished = moment.at

    def lose_engine(self) -> None:
        """Notes that the engine is gone."""
        if not self.events or self.events[-1][0] != "engine_lost":  # else it was not back yet
            self.events.append(("engine_lost", time.monotonic()))

    def end(self) -> None:
        """Notes that nobody waits for it any more."""
        self.ended = time.monotonic()


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a call's generations took, in seconds; None where it did not come to that."""

    queue: float | None
    first_token: float | None
    prefill: float | None
    decode: float | None
    inference: float | None

    @classmethod
    def of(cls, began: float, sequences: list[SequenceTimeline]) -> Timings:
        """Those of a call: the first text's in the queue, and of all texts from there on."""
        started = _least([item.started for item in sequences])
        spoken = _least([item.first_token for item in sequences])
        ends = [item.finished or item.ended for item in sequences]
        ended = max((end for end in ends if end is not None), default=None)
        return cls(
            queue=_between(sequences[0].submitted if sequences else None, started),
            first_token=_between(began, spoken),
            prefill=_between(started, spoken),
            decode=_between(spoken, ended),
            inference=_between(started, ended),
        )


def _least(times: list[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(end - start, 0.0)
