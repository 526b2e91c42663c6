"""Checks grammars before a request is queued: their shape here, the rest in worker processes.

A grammar delays only the requests that ask for it: it is compiled on trial in a process that can be
killed, with bounded memory and time, once for all requests that ask for it at the same time, and
the result is cached. A trial that takes longer than usual does not make other grammars wait.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import psutil

from engine.protocol.wire import HEADER, framed

from ..errors import ErrorKind, ServiceError, overloaded
from .spec import Grammar

MAX_GRAMMAR_BYTES = 256 * 1024  # of its JSON text
_MAX_DEPTH = 60  # of objects and lists in a schema: what the library accepts
_CACHE_BYTES = 16 * 1024 * 1024  # of cached grammars and their results
_WORKER_BYTES = 2 * 1024**3  # address space of a process; it needs about 300 MB itself
_START_S = 60.0  # for a process to start on a busy machine
_NICENESS = 12  # of the processes' sessions; with less they slow other processes down (measured)
_NUM_TRIES, _RETRY_S = 50, 0.1  # to set it
_MIN_SHARE = 0.25  # of a processor; with less a timeout is the machine's fault, not the grammar's
_SOON_S = 1.0  # for a usual grammar, also on a busy machine; a trial that takes longer is slow
_MAX_SLOW = 2  # slow trials at a time; when there are more, their requests are refused
_NUM_TRIALS = 2  # of a grammar whose process dies, which need not be the grammar's fault
_FIELD = "parameters.grammar"


class GrammarChecker:
    """Turns grammars into sources that the engine can compile.

    Args:
        tokenizer: the tokenizer.json, as text.
        vocab_size: width of the model's logits.
        eos_token_ids: tokens that end a text.
        enabled: whether grammars are accepted at all.
        best_effort: whether keywords that cannot be enforced are ignored instead of refused.
        deadline_s: seconds that a grammar may take.
        num_workers: number of processes, not counting those of slow trials.
    """

    def __init__(
        self,
        tokenizer: str,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        enabled: bool = True,
        best_effort: bool = False,
        deadline_s: float = 5.0,
        num_workers: int = 2,
    ) -> None:
        self._enabled = enabled
        self._best_effort = best_effort
        self._deadline_s = deadline_s
        self._setup = framed([tokenizer, vocab_size, sorted(eos_token_ids)])
        self._workers: asyncio.Queue[_Worker] = asyncio.Queue()
        for _ in range(num_workers):
            self._workers.put_nowait(_Worker(self._setup))
        self._num_slow = 0  # trials whose process was replaced among the workers
        self._known: OrderedDict[bytes, dict[str, str]] = OrderedDict()
        self._known_bytes = 0
        self._trials: dict[bytes, _Trial] = {}
        self._tasks: set[asyncio.Task[dict[str, str]]] = set()  # of all trials, abandoned ones too

    async def check(self, grammar: Grammar) -> str:
        """Returns the source of a grammar, which the engine compiles.

        Raises:
            ServiceError: the grammar is malformed, cannot be enforced, or takes too long.
        """
        if not self._enabled:
            raise ServiceError(ErrorKind.VALIDATION, "grammar is not supported", field=_FIELD)
        request = self._request(grammar)
        try:
            key = msgpack.packb(request)
        except OverflowError as error:
            raise _invalid("it has a number of more than 64 bits") from error
        if len(key) > MAX_GRAMMAR_BYTES:
            raise _too_large(len(key))
        answer = self._known.get(key)
        if answer is None:
            answer = await self._answer(key, request)
        else:
            self._known.move_to_end(key)
        if "error" in answer:
            raise _invalid(answer["error"])
        return answer["source"]

    async def close(self) -> None:
        """Ends the processes."""
        tasks = list(self._tasks)
        for task in tasks:
            if not task.cancelling():  # else it is waiting for the end of its process
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # they return their processes
        while not self._workers.empty():
            await self._workers.get_nowait().stop()

    def _request(self, grammar: Grammar) -> dict[str, Any]:
        if grammar.kind not in ("json", "regex"):
            raise _missing("type")
        if grammar.value is None:
            raise _missing("value")
        if grammar.kind == "regex":
            if not isinstance(grammar.value, str):
                raise ServiceError(
                    ErrorKind.SHAPE, f"{_FIELD}.value: expected a string", field=_FIELD
                )
            return {"kind": "regex", "value": grammar.value}
        return {
            "kind": "json",
            "value": _schema(grammar.value),
            "or_text": grammar.or_text,
            "best_effort": self._best_effort,
        }

    async def _answer(self, key: bytes, request: dict[str, Any]) -> dict[str, str]:
        """The result of a trial that its callers share; the trial ends when the last one leaves."""
        trial = self._trials.get(key)
        if trial is None:
            task = asyncio.create_task(self._try(key, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            trial = self._trials[key] = _Trial(task)
        trial.num_waiting += 1
        try:
            return await asyncio.shield(trial.task)
        finally:
            trial.num_waiting -= 1
            if not trial.num_waiting:
                if self._trials.get(key) is trial:
                    del self._trials[key]
                trial.task.cancel()  # no effect if it is done

    async def _try(self, key: bytes, request: dict[str, Any]) -> dict[str, str]:
        worker = await self._workers.get()
        asking = asyncio.create_task(worker.ask(request, self._deadline_s))
        is_slow = False
        try:
            if not await worker.answers_soon(asking):
                if self._num_slow >= _MAX_SLOW:
                    raise overloaded()
                is_slow = True
                self._num_slow += 1
                self._workers.put_nowait(_Worker(self._setup))  # for the other grammars
            answer = await asking
        finally:
            asking.cancel()  # no effect if it is done; otherwise its process is killed
            await asyncio.gather(asking, return_exceptions=True)
            if is_slow:
                self._num_slow -= 1
                await worker.stop()
            else:
                self._workers.put_nowait(worker)
        self._remember(key, answer)
        return answer

    def _remember(self, key: bytes, answer: dict[str, str]) -> None:
        self._known[key] = answer
        self._known_bytes += _size(key, answer)
        while self._known_bytes > _CACHE_BYTES:
            self._known_bytes -= _size(*self._known.popitem(last=False))


@dataclass(slots=True)
class _Trial:
    """A grammar that is being compiled on trial, and how many callers wait for it."""

    task: asyncio.Task[dict[str, str]]
    num_waiting: int = 0


class _Worker:
    """One process, started when it is first needed and again after it had to be killed."""

    def __init__(self, setup: bytes) -> None:
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._trying = asyncio.Event()  # the process has started: the grammar's time begins

    async def answers_soon(self, asking: asyncio.Task[dict[str, str]]) -> bool:
        """Whether `ask` ends in the time of a usual grammar, counted from when the process runs."""
        trying = asyncio.create_task(self._trying.wait())
        try:
            await asyncio.wait({asking, trying}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({asking}, timeout=_SOON_S)
        finally:
            trying.cancel()
        return asking.done()

    async def ask(self, request: dict[str, Any], deadline_s: float) -> dict[str, str]:
        """The answer to a request; a process that does not answer in time is killed.

        Raises:
            ServiceError: there was no answer. This is not cached, since a busy machine may be the
                cause; with hardly any processor time it certainly is, and the error says overload.
        """
        self._trying.clear()
        for _ in range(_NUM_TRIALS):
            try:
                process = self._process or await self._start()
                before = _processor_s(process.pid)
                self._trying.set()
                async with asyncio.timeout(deadline_s):
                    return await _exchange(process, request)
            except TimeoutError:
                spent = _processor_s(process.pid) - before
                await self.stop()
                if spent < _MIN_SHARE * deadline_s:
                    raise overloaded() from None
                raise _invalid(f"it takes more than {deadline_s:g} s to compile") from None
            except (OSError, psutil.Error, asyncio.IncompleteReadError):
                await self.stop()
            except asyncio.CancelledError:
                await self.stop()
                raise
        raise _invalid("it needs too much memory or time to compile")

    async def stop(self) -> None:
        """Kills the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        """Starts the process and waits until it answers; a grammar's time begins only then."""
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.grammar.worker",
            str(_WORKER_BYTES),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        await _lower_priority(process.pid)
        assert process.stdin is not None
        process.stdin.write(self._setup)
        try:
            async with asyncio.timeout(_START_S):
                await _exchange(process, {"kind": "regex", "value": "a"})
        except TimeoutError as error:
            raise OSError("the grammar process does not come up") from error
        return process


async def _lower_priority(pid: int) -> None:
    """Gives a process the lowest priority, right after its start, while it imports."""
    with suppress(OSError):  # the process may have ended; not every kernel has autogroups
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        for _ in range(_NUM_TRIES):
            if _lower_session(pid):
                return
            await asyncio.sleep(_RETRY_S)


def _lower_session(pid: int) -> bool:
    """Lowers the priority of a process's session; returns False if it has to be tried again.

    With autogroups Linux divides the processors among sessions first, then within each of them. It
    allows ten changes a second, of all users together.
    """
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(_NICENESS))
    except BlockingIOError:
        return False
    return True


def _processor_s(pid: int) -> float:
    """Processor time that a process has had, in seconds."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def _exchange(process: asyncio.subprocess.Process, request: Any) -> dict[str, str]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(framed(request))
    await process.stdin.drain()
    (size,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
    answer: dict[str, str] = msgpack.unpackb(await process.stdout.readexactly(size))
    return answer


def _missing(name: str) -> ServiceError:
    return ServiceError(
        ErrorKind.SHAPE, f"{_FIELD}: missing field `{name}`", field=f"{_FIELD}.{name}"
    )


def _too_large(size: int) -> ServiceError:
    return _invalid(f"it must have at most {MAX_GRAMMAR_BYTES} bytes. Given: {size}")


def _invalid(reason: str) -> ServiceError:
    """The error for a grammar that cannot be used."""
    return ServiceError(ErrorKind.VALIDATION, f"grammar is not valid: {reason}", field=_FIELD)


def _schema(value: Any) -> dict[str, Any]:
    """A schema, which is given as an object or as a string that contains one.

    Raises:
        ServiceError: it is neither, or too deep.
    """
    if isinstance(value, str):
        if len(value) > MAX_GRAMMAR_BYTES:
            raise _too_large(len(value))
        try:
            value = json.loads(value)
            json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise _invalid(str(error)) from error
        if not isinstance(value, dict):
            raise _invalid("it is not an object")
    if not isinstance(value, dict):
        raise ServiceError(ErrorKind.VALIDATION, "grammar is not supported", field=_FIELD)
    if _depth(value) > _MAX_DEPTH:
        raise _invalid(f"it is nested more than {_MAX_DEPTH} deep")
    return value


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level and depth <= _MAX_DEPTH:
        depth += 1
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    return depth


def _size(key: bytes, answer: dict[str, str]) -> int:
    return len(key) + sum(map(len, answer.values()))
