"""Permits counted by several processes: all of them together, without those of the dead."""

from __future__ import annotations

import signal
import subprocess
import zlib
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from pathlib import Path

import pytest

from service.call_record import begin_record
from service.errors import ErrorKind, ServiceError
from service.generation.admission import Admission
from service.launch.place import Place
from service.siblings import permits as permits_module
from service.siblings.permits import SharedPermits
from tests.service.ready_process import ready_process

# A sibling of its own process: holds permits until it is killed.
_SIBLING = """
import signal, sys
from pathlib import Path
from service.launch.place import Place
from service.siblings.permits import SharedPermits
shared = SharedPermits(Place(2, 2, Path(sys.argv[1])), 16)
shared.publish({"greedy": 3})
print("ready", flush=True)
signal.pause()
"""


def sibling(directory: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """A second process, which holds three permits."""
    return ready_process(_SIBLING, str(directory))


def admissions(directory: Path, limit: int, **bounds: int) -> list[Admission]:
    """What two processes would have."""
    places = [Place(number, 2, directory) for number in (1, 2)]
    return [Admission(limit, shared=SharedPermits(place, 2 * limit), **bounds) for place in places]


def refusal(admission: Admission, caller: str = "", count: int = 1) -> ServiceError | None:
    """Why a caller gets no permits; None if it gets them."""

    def ask() -> ServiceError | None:
        begin_record(None, caller)
        try:
            with admission.permit(count):
                return None
        except ServiceError as error:
            return error

    return copy_context().run(ask)


def take(inside: ExitStack, admission: Admission, caller: str, count: int = 1) -> None:
    """Holds permits of a caller."""

    def enter() -> None:
        begin_record(None, caller)
        inside.enter_context(admission.permit(count))

    copy_context().run(enter)


def test_the_limit_is_that_of_all_processes_together(tmp_path: Path) -> None:
    first, second = admissions(tmp_path, 3)
    with ExitStack() as inside:
        take(inside, first, "a", 2)
        take(inside, second, "a", 1)
        for admission in (first, second):
            error = refusal(admission, "a")
            assert error is not None
            assert error.kind is ErrorKind.OVERLOADED
        assert (first.num_active, second.num_active) == (2, 1)
    assert refusal(first, "a", 3) is None
    assert refusal(second, "a", 3) is None


def test_one_process_may_give_all_permits(tmp_path: Path) -> None:
    """Connections of gRPC stay where they are, so a division of permits would be unfair."""
    first, second = admissions(tmp_path, 4)
    with ExitStack() as inside:
        take(inside, first, "a", 4)
        assert refusal(second, "a") is not None


def test_a_caller_has_one_limit_in_all_processes(tmp_path: Path) -> None:
    first, second = admissions(tmp_path, 8, max_per_caller=2)
    with ExitStack() as inside:
        take(inside, first, "a")
        take(inside, second, "a")
        assert refusal(first, "a") is not None
        assert refusal(second, "a") is not None
        assert refusal(second, "b") is None


def test_a_caller_gets_its_share_whoever_holds_the_others(tmp_path: Path) -> None:
    first, second = admissions(tmp_path, 4)
    with ExitStack() as inside:
        take(inside, first, "greedy", 4)
        take(inside, second, "modest", 2)
        assert refusal(second, "modest") is not None  # half of the permits, and no more
        assert refusal(first, "greedy") is not None


def test_what_a_process_holds_does_not_count_once_it_is_dead(tmp_path: Path) -> None:
    shared = SharedPermits(Place(1, 2, tmp_path), 16)
    with sibling(tmp_path) as process:
        assert shared.elsewhere() == {"greedy": 3}
        process.send_signal(signal.SIGSTOP)
        assert shared.elsewhere() == {"greedy": 3}  # frozen: its calls may go on
        process.kill()
        process.wait()
        assert not shared.elsewhere()
    SharedPermits(Place(2, 2, tmp_path), 16).publish({"a": 1})  # another one in its place
    assert shared.elsewhere() == {"a": 1}


def test_a_value_that_is_just_being_written_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (SharedPermits(Place(number, 2, tmp_path), 16) for number in (1, 2))
    second.publish({"a": 1})
    assert first.elsewhere() == {"a": 1}
    monkeypatch.setattr(permits_module.zlib, "crc32", lambda body: zlib.adler32(body) ^ 1)
    second.publish({"a": 2})
    monkeypatch.undo()
    assert first.elsewhere() == {"a": 1}
    second.publish({"a": 3})
    assert first.elsewhere() == {"a": 3}


def test_there_is_room_for_as_many_callers_as_there_are_permits(tmp_path: Path) -> None:
    count = 300
    held = {f"{number:04}".ljust(128, "x"): 1 for number in range(count)}
    first, second = (SharedPermits(Place(number, 2, tmp_path), count) for number in (1, 2))
    second.publish(held)
    assert first.elsewhere() == held
