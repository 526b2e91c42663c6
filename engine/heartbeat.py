"""Says whether the step thread gets on, from a thread of its own.

The step thread notes what it begins to do (`Activity`). A second thread (`Heartbeat`) looks at the
note a few times a second and tells its listeners how long there has been no progress. A frozen
process is noticed by its silence; a step thread that hangs in a process that does not, by what this
thread says. A long step does not look like a hanging one, since it uses the processor.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import psutil

from .protocol.notify import ALIVE, notify

logger = logging.getLogger(__name__)

_BEAT_S = 0.25
_MIN_USE = 0.02  # of a processor: a thread that uses less does not compute
_REPORT_S = 2.0  # without progress, after which a log line says where the thread is


@dataclass(frozen=True, slots=True)
class _Patience:
    """How long a phase may last, in seconds.

    Attributes:
        unused: how long it may use no processor.
        whole: how long it may take while it uses one.
    """

    unused: float
    whole: float


class Phase(Enum):
    """What the step thread can be busy with, and how long that is progress."""

    # A download or a slow disk uses little of a processor, and a large model loads for long: how
    # long a start may take is up to whoever started this process.
    LOADING = _Patience(unused=600.0, whole=float("inf"))
    WAITING_FOR_REQUESTS = _Patience(unused=1.0, whole=1.0)  # it looks around all the time
    # Large steps on few processors take minutes, as does compiling kernels for the first time.
    COMPUTING = _Patience(unused=0.0, whole=600.0)
    # Waiting may keep a processor busy, so its use proves nothing.
    WAITING_FOR_DEVICE = _Patience(unused=0.0, whole=0.0)


class Activity:
    """What the step thread does; made and written by that thread alone."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.count = 0  # of phases so far
        self.thread_id = threading.get_ident()
        self.companions: frozenset[int] = frozenset()  # processes below that do not work for it
        self._clock = time.pthread_getcpuclockid(self.thread_id)

    def begin(self, phase: Phase) -> None:
        """The thread begins something else, or the same again."""
        self.phase = phase
        self.count += 1

    def processor_s(self) -> float:
        """Processor time so far, in seconds: of the thread, or of all while a model is loaded."""
        if self.phase is Phase.LOADING:
            return time.process_time() - time.thread_time()
        return time.clock_gettime(self._clock)

    def where(self) -> str:
        """The innermost functions that the thread is in."""
        frame = sys._current_frames().get(self.thread_id)
        calls = traceback.extract_stack(frame)[-3:] if frame is not None else []
        return " > ".join(f"{call.name} ({call.filename}:{call.lineno})" for call in calls)


class Heartbeat:
    """Watches an activity, and tells the watcher of this process while there is progress.

    Args:
        activity: of the step thread.
        clock: monotonic seconds.

    Attributes:
        listeners: called at every beat with the seconds without progress, 0 if there is some.
    """

    def __init__(self, activity: Activity, clock: Callable[[], float] = time.monotonic) -> None:
        self._activity = activity
        self._clock = clock
        self._count = -1
        self._begun = self._progress = clock()
        self._usage = _Usage(activity)
        self._reported = False
        self.listeners: list[Callable[[float], object]] = []

    def start(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def beat(self) -> float:
        """Looks at the activity; returns the seconds without progress, 0 if there is some."""
        now = self._clock()
        if self._progresses(now):
            self._progress, self._reported = now, False
            notify(ALIVE)
        quiet = now - self._progress
        if quiet >= _REPORT_S and not self._reported:
            self._reported = True
            phase = self._activity.phase.name.lower().replace("_", " ")
            logger.error(
                "no progress for %.0f s while %s, in %s", quiet, phase, self._activity.where()
            )
        for listener in tuple(self.listeners):
            listener(quiet)
        return quiet

    def _progresses(self, now: float) -> bool:
        count, patience = self._activity.count, self._activity.phase.value
        if count != self._count:
            self._count, self._begun = count, now
            self._usage.begin(now)
            return True
        unused = self._usage.unused_s(now)
        return now - self._begun <= patience.whole and unused <= patience.unused

    def _run(self) -> None:
        while True:
            self.beat()
            time.sleep(_BEAT_S)


class _Usage:
    """How long a step thread and the compilers it started have used no processor."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self._since = 0.0
        self._own = self._children = 0.0  # processor time at that moment

    def begin(self, now: float) -> None:
        """Counts from now on."""
        self._since, self._own, self._children = now, self._activity.processor_s(), 0.0

    def unused_s(self, now: float) -> float:
        """The seconds without use; 0 if there was some since the last look."""
        enough = _MIN_USE * (now - self._since)
        if self._activity.processor_s() - self._own >= enough:
            self.begin(now)
            return 0.0
        # Only now, since it reads a lot of /proc. Children that are new count with all they used.
        children = _of_children(self._activity.companions)
        grown, self._children = children - self._children, children
        if grown >= enough:
            self._since = now
        return now - self._since


def _of_children(others: frozenset[int]) -> float:
    """Processor time of the processes below this one, but for `others`, in seconds."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        if child.pid in others:
            continue
        try:
            times = child.cpu_times()
        except psutil.Error:  # it has ended
            continue
        total += times.user + times.system
    return total
