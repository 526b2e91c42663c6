"""Checks grammars before a request is queued: their shape here, the rest in worker processes.

A grammar delays only the requests that ask for it: it is compiled on trial in a process that can be
killed, with bounded memory and time, once for all requests that ask for it at the same time, and
the result is cached. A trial that takes longer than usual does not make other grammars wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from sys import getsizeof
from typing import Any, Protocol

from engine.protocol.wire import framed

from ..errors import ErrorKind, ServiceError, fields_named, overloaded
from ..workers.courtesy import giving_way
from ..workers.process import DeadError, LateError, WorkerProcess
from ..workers.template import Template
from .depth import MAX_DEPTH, is_deeper
from .rules import schemas_of
from .spec import Backend, Grammar

logger = logging.getLogger(__name__)

MAX_GRAMMAR_BYTES = 256 * 1024  # of its JSON text
_CACHE_BYTES = 16 * 1024 * 1024  # of cached grammars and their results
_MAX_KNOWN = 1024  # of them; a short one takes a kilobyte, and may never be asked for again
_TRIAL_BYTES = 3 * 1024**3 // 2  # of memory, beside the vocabulary's table, which is shared
_SOON_S = 1.0  # for a usual grammar, also on a busy machine; a trial that takes longer is slow
_MAX_SLOW = 2  # slow trials at a time; when there are more, their requests are refused
_JSON = json.JSONEncoder(ensure_ascii=False)
_WORKER = f"{__package__}.worker"
_FIELD = "parameters.grammar"
_OTHER_FIELD = f"{_FIELD}.other"  # of what a text may fit instead
_PARTS = (f"{_FIELD}.type", f"{_FIELD}.value")  # which only what callers write themselves can lack
_OF_OTHER = {_FIELD: _OTHER_FIELD, **dict(zip(_PARTS, _PARTS, strict=True))}

# How a trial ends: "failed" is one that took too long or too much memory, "abandoned" one whose
# callers have left.
OUTCOMES = ("compiled", "refused", "failed", "overloaded", "abandoned")


class Watcher(Protocol):
    """Who wants to know what grammars cost."""

    def grammar_tried(self, outcome: str, seconds: float) -> None:
        """A grammar was compiled on trial; `outcome` is one of `OUTCOMES`."""

    def grammar_known(self) -> None:
        """A grammar needed no trial, because its result is known."""


class GrammarChecker:
    """Turns grammars into sources that the engine can compile.

    Args:
        tokenizer: the tokenizer.json, as text.
        vocab_size: width of the model's logits.
        eos_token_ids: tokens that end a text.
        enabled: whether grammars are accepted at all.
        best_effort: whether keywords that cannot be enforced are ignored instead of refused.
        strict_formats: whether formats that are not known are refused instead of ignored.
        deadline_s: seconds that a grammar may take.
        backend: the library: "llguidance", "outlines", or "auto" for the second one where only that
            one is exact.
        num_workers: number of processes, not counting those of slow trials.
        watcher: is told of trials and of what needs none.
    """

    def __init__(
        self,
        tokenizer: str,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        enabled: bool = True,
        best_effort: bool = False,
        strict_formats: bool = False,
        deadline_s: float = 5.0,
        backend: Backend = "auto",
        num_workers: int = 2,
        watcher: Watcher | None = None,
    ) -> None:
        self._watcher = watcher
        self._enabled = enabled
        self._reading = {"best_effort": best_effort, "strict_formats": strict_formats}
        self._deadline_s = deadline_s
        setup = framed([tokenizer, vocab_size, sorted(eos_token_ids), backend])
        self._template = Template(_WORKER, _TRIAL_BYTES, setup)
        self._unusable = ""  # why the model has no grammars
        self._is_told = asyncio.Event()  # whether it has any; a start that goes on finds it out
        self._is_told.set()
        self._workers: asyncio.Queue[WorkerProcess] = asyncio.Queue()
        for _ in range(num_workers):
            self._workers.put_nowait(self._new_worker())
        self._num_slow = 0  # trials whose process was replaced among the workers
        self._known: OrderedDict[bytes, dict[str, str]] = OrderedDict()
        self._known_bytes = 0
        self._trials: dict[bytes, _Trial] = {}
        self._tasks: set[asyncio.Task[dict[str, str]]] = set()  # of all trials, abandoned ones too

    async def start(self) -> None:
        """Builds the vocabulary's table and starts the processes, before the first grammar comes.

        A table that cannot be built is logged, and grammars are refused. Those that come meanwhile
        wait.
        """
        if not self._enabled:
            return
        self._is_told.clear()
        try:
            self._unusable = str(await self._template.start() or "")
        except OSError:  # a busy machine: the first grammar tries again
            logger.warning("the processes for grammars do not come up", exc_info=True)
        finally:
            self._is_told.set()
        if self._unusable:
            logger.warning("no grammars with this model: %s", self._unusable)
            return
        for worker in [self._workers.get_nowait() for _ in range(self._workers.qsize())]:
            try:
                await worker.start()
            finally:
                self._workers.put_nowait(worker)

    async def check(self, grammar: Grammar) -> str:
        """Returns the source of a grammar, which the engine compiles.

        Raises:
            ServiceError: the grammar is malformed, cannot be enforced, or takes too long.
        """
        if not self._enabled:
            raise ServiceError(ErrorKind.VALIDATION, "grammar is not supported", field=_FIELD)
        await self._is_told.wait()
        if self._unusable:
            text = f"grammar is not supported: {self._unusable}"
            raise ServiceError(ErrorKind.VALIDATION, text, field=_FIELD)
        request = await asyncio.to_thread(self._request, grammar)  # a schema may be large
        key = await asyncio.to_thread(_packed, request)
        if len(key) > MAX_GRAMMAR_BYTES:
            raise _too_large(len(key))
        answer = self._known.get(key)
        if answer is None:
            answer = await self._answer(key)
        else:
            self._known.move_to_end(key)
            if self._watcher is not None:
                self._watcher.grammar_known()
        if "error" in answer:
            if answer.get("part") == "other":
                raise _invalid(answer["error"], _OTHER_FIELD)
            raise _invalid(grammar.named(answer["error"]))
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
        await self._template.stop()

    def _request(self, grammar: Grammar) -> dict[str, Any]:
        request = self._constraint(grammar)
        if grammar.lead is not None:
            request["lead"] = grammar.lead
        if grammar.other is not None:
            with fields_named(_OF_OTHER):
                request["other"] = self._request(grammar.other)
            request["beginnings"] = grammar.beginnings
        return request

    def _constraint(self, grammar: Grammar) -> dict[str, Any]:
        if grammar.kind == "rule":
            for schema in schemas_of(grammar.value):
                _check_depth(schema)
            return {"kind": "rule", "value": grammar.value, **self._reading}
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
            "value": _schema(grammar.value, grammar.num_levels),
            "or_text": grammar.or_text,
            **self._reading,
        }

    async def _answer(self, key: bytes) -> dict[str, str]:
        """The result of a trial that its callers share; the trial ends when the last one leaves."""
        trial = self._trials.get(key)
        if trial is None:
            task = asyncio.create_task(self._watched(key))
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

    async def _watched(self, key: bytes) -> dict[str, str]:
        """The result of a trial, of which the watcher is told."""
        started, outcome = time.monotonic(), "abandoned"
        try:
            answer = await self._try(key)
            outcome = "refused" if "error" in answer else "compiled"
            return answer
        except ServiceError as error:
            outcome = "overloaded" if error.kind is ErrorKind.OVERLOADED else "failed"
            raise
        finally:
            if self._watcher is not None:
                self._watcher.grammar_tried(outcome, time.monotonic() - started)

    async def _try(self, key: bytes) -> dict[str, str]:
        worker = await self._workers.get()
        asking = asyncio.create_task(self._ask(worker, key))
        is_slow = False
        try:
            if not await worker.answers_soon(asking, _SOON_S):
                if self._num_slow >= _MAX_SLOW:
                    raise overloaded()
                is_slow = True
                self._num_slow += 1
                self._workers.put_nowait(self._new_worker())  # for the other grammars
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

    async def _ask(self, worker: WorkerProcess, request: bytes) -> dict[str, str]:
        """The result of a trial in a process.

        Raises:
            ServiceError: there is none. This is not cached, since a busy machine may be the cause;
                with hardly any processor time it certainly is, and the error says overload.
        """
        try:
            answer: dict[str, str] = await worker.ask(request, self._deadline_s)
        except LateError as error:
            if error.is_starved:
                raise overloaded() from None
            reason = f"it takes more than {self._deadline_s:g} s to compile"
            raise _invalid(reason) from None
        except DeadError:
            raise _invalid("it needs too much memory or time to compile") from None
        return answer

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess.of_template(self._template)

    def _remember(self, key: bytes, answer: dict[str, str]) -> None:
        self._known[key] = answer
        self._known_bytes += _size(key, answer)
        while self._known_bytes > _CACHE_BYTES or len(self._known) > _MAX_KNOWN:
            self._known_bytes -= _size(*self._known.popitem(last=False))


@dataclass(slots=True)
class _Trial:
    """A grammar that is being compiled on trial, and how many callers wait for it."""

    task: asyncio.Task[dict[str, str]]
    num_waiting: int = 0


def _packed(request: dict[str, Any]) -> bytes:
    """A request as JSON, which keeps integers of any size; value by value, as the loop goes first.

    Raises:
        ServiceError: one has thousands of digits.
    """
    try:
        return "".join(giving_way(_JSON.iterencode(request))).encode()
    except ValueError as error:
        raise _invalid(str(error)) from error


def _missing(name: str) -> ServiceError:
    return ServiceError(
        ErrorKind.SHAPE, f"{_FIELD}: missing field `{name}`", field=f"{_FIELD}.{name}"
    )


def _too_large(size: int) -> ServiceError:
    return _invalid(f"it must have at most {MAX_GRAMMAR_BYTES} bytes. Given: {size}")


def _invalid(reason: str, field: str = _FIELD) -> ServiceError:
    """The error for a grammar that cannot be used."""
    return ServiceError(ErrorKind.VALIDATION, f"grammar is not valid: {reason}", field=field)


def _schema(value: Any, num_levels: int) -> dict[str, Any]:
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
    _check_depth(value, num_levels)
    return value


def _check_depth(value: Any, num_levels: int = 0) -> None:
    if is_deeper(value, MAX_DEPTH + num_levels):
        raise _invalid(f"it is nested more than {MAX_DEPTH} deep")


def _size(key: bytes, answer: dict[str, str]) -> int:
    """Bytes of memory, of which a short text is the smaller part."""
    return sum(map(getsizeof, (key, answer, *answer.values())))
