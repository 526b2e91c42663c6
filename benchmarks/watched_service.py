"""`tokenwire service` whose event loop is watched: a line of JSON whenever it stands still.

A timer of the loop looks at the clock every millisecond. A thread looks at the timer, and notes
what all threads do while it is late: where code held the interpreter's lock in one call, a thread
is seen right after the call. A block counts as long as the process used a processor in it, and
without what the loop's own thread waited for one, so that a machine with other work makes none.
Collections of garbage are noted by their generation.

    python -m benchmarks.watched_service FILE service …
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from service import cli

_BEAT_S = 0.001
_LATE_S = 0.002  # from which on threads are looked at, and a block is noted
_SCHEDULE = Path("/proc/thread-self/schedstat")
_OURS = ("/service/", "/engine/")
_WAITING = {
    *("wait", "select", "sleep", "_worker", "get", "accept", "acquire", "_do_waitpid"),
    "run",  # of a thread that is not Python's inside: that of gRPC
}


class Watch:
    """What is known of the loop.

    Args:
        path: where lines are written to.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._at = time.monotonic()
        self._seen: Counter[str] = Counter()
        self._collections: list[
            tuple[int, float]
        ] = []  # generation and seconds since the last beat
        self._collecting = 0.0

    async def beat(self) -> None:
        """The loop's timer."""
        gc.callbacks.append(self._collected)
        threading.Thread(target=self.look, daemon=True).start()
        used, waited = time.process_time(), _waited_s()
        while True:
            await asyncio.sleep(_BEAT_S)
            now, used_before, waited_before = time.monotonic(), used, waited
            used, waited = time.process_time(), _waited_s()
            passed = now - self._at - _BEAT_S - (waited - waited_before)
            late = min(passed, used - used_before)
            if late >= _LATE_S:
                self._note(now, late)
            self._at = now
            self._seen.clear()
            self._collections.clear()

    def look(self) -> None:
        """The thread."""
        own = threading.get_ident()
        while True:
            time.sleep(_BEAT_S)
            if time.monotonic() - self._at < _LATE_S:
                continue
            for ident, frame in sys._current_frames().items():
                if ident != own and frame.f_code.co_name not in _WAITING:
                    self._seen[_place(frame)] += 1

    def _note(self, now: float, late: float) -> None:
        seen = [place for place, _ in self._seen.most_common(2)]
        seen += [f"gc {generation}: {1e3 * s:.1f} ms" for generation, s in self._collections]
        self._file.write(json.dumps({"at": now, "ms": 1e3 * late, "seen": seen}) + "\n")

    def _collected(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._collecting = time.monotonic()
        else:
            self._collections.append((info["generation"], time.monotonic() - self._collecting))


def _waited_s() -> float:
    """How long this thread has waited for a processor, ready to run."""
    _, waited_ns, _ = _SCHEDULE.read_text().split()
    return int(waited_ns) * 1e-9


def _place(frame: FrameType) -> str:
    """Where a thread is: its innermost function, and the innermost line of our own code."""
    own: FrameType | None = frame
    while own is not None and not any(part in own.f_code.co_filename for part in _OURS):
        own = own.f_back
    if own is None:
        return frame.f_code.co_qualname
    return f"{Path(own.f_code.co_filename).name}:{own.f_lineno} {frame.f_code.co_qualname}"


def main() -> int:
    """Runs the service."""
    cli._hide_torch()  # as it does before its modules are imported
    import service.app

    watch, serve = Watch(Path(sys.argv[1])), service.app.serve

    async def watched(settings: Any) -> None:
        beat = asyncio.create_task(watch.beat())
        try:
            await serve(settings)
        finally:
            beat.cancel()

    service.app.serve = watched
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
