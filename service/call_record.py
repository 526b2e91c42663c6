"""What is noted of a call while it runs, for its log lines and its trace: who asked, what happened.

Never its content, but where traces shall have it. A handler's task and all that it starts see the
same record.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .timeline import SequenceTimeline, Stage, Timings

REQUEST_ID_HEADER = "x-request-id"
CANCELLED = "cancelled"  # the error of a call whose caller has left
_VALID_ID = re.compile(r"[!-~]{1,128}")  # visible ASCII: it goes into headers and log lines
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}"
    r"-(?P<flags>[0-9a-f]{2})(-.*)?"
)
_SAMPLED = 1  # the bit that says that the trace is recorded


@dataclass(slots=True)
class Content:
    """The texts of a call, as OpenTelemetry's conventions have them in JSON."""

    input_messages: list[dict[str, Any]] = field(default_factory=list)
    is_conversation: bool = False  # so the prompt that is made of it is none of its messages
    outputs: list[tuple[str, str]] = field(default_factory=list)  # texts and finish reasons


@dataclass(slots=True)
class CallRecord:
    """The notes of one call.

    Attributes:
        request_id: the caller's, or one made here.
        caller: who asked, as `api/caller.py` names callers; equal for all calls of one caller.
        num_prompt_tokens: of all prompts that the engine was given, after truncation.
        num_generated_tokens: of all texts, also of those that did not come to their end.
        num_cached_tokens: those of the prompts that the KV cache had already.
        trace_id: of the trace that it belongs to, in hex; empty if there is none.
        is_sampled: whether somebody records that trace.
        operation: what is asked for, in the words of OpenTelemetry's conventions.
        error_type: how it failed, in the words of `errors.py`; empty if it did not.
        began: when it came, in seconds of the monotonic clock.
        stages: before the engine.
        sequences: the texts that the engine generates for it.
        parameters: of the generation that it asks for.
        num_choices: texts that are wanted of each prompt.
        is_stream: whether they are sent token by token.
        finish_reasons: of its finished texts.
        answer_id: of the answer, where it has an id of its own.
        content: its texts, where traces shall have them.
        is_aborted: whether somebody has ended it by its id.
    """

    request_id: str
    caller: str = ""
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    trace_id: str = ""
    is_sampled: bool = False
    operation: str = "text_completion"
    error_type: str = ""
    began: float = field(default_factory=time.monotonic)
    stages: list[Stage] = field(default_factory=list)
    sequences: list[SequenceTimeline] = field(default_factory=list)
    parameters: Any = None
    num_choices: int = 1
    is_stream: bool = False
    finish_reasons: list[str] = field(default_factory=list)
    answer_id: str = ""
    content: Content | None = None
    is_aborted: bool = False

    @property
    def recorded_trace(self) -> str:
        """The id of its trace, if somebody can look that up."""
        return self.trace_id if self.is_sampled else ""

    def fail(self, error_type: str) -> None:
        """Notes how it failed: the first reason counts, unless that is only that it was ended."""
        if not self.error_type or self.error_type == CANCELLED:
            self.error_type = error_type

    def timings(self) -> Timings:
        """How long its generations took."""
        return Timings.of(self.began, self.sequences)


_current: ContextVar[CallRecord | None] = ContextVar("call_record", default=None)


def begin_record(
    given_id: str | None, caller: str = "", traceparent: str | None = None
) -> CallRecord:
    """Starts the record of the current task's call, with the caller's ids if they can be used.

    `traceparent` is the W3C's header of that name.
    """
    is_valid = given_id is not None and _VALID_ID.fullmatch(given_id)
    request_id = given_id if given_id is not None and is_valid else uuid.uuid4().hex
    record = CallRecord(request_id, caller)
    if (found := _TRACEPARENT.fullmatch(traceparent or "")) is not None:
        record.trace_id = found["trace"]
        record.is_sampled = bool(int(found["flags"], 16) & _SAMPLED)
    _current.set(record)
    return record


def rename_call(request_id: str) -> bool:
    """Gives the current call the id that its request names; returns whether it can be one."""
    if not _VALID_ID.fullmatch(request_id):
        return False
    record = _current.get()
    if record is not None:
        record.request_id = request_id
    return True


def current_record() -> CallRecord | None:
    """The record of the call that this code runs for, if it runs for one."""
    return _current.get()


def note_operation(name: str) -> None:
    """Says what the current call asks for."""
    record = _current.get()
    if record is not None:
        record.operation = name


def note_request(parameters: Any, num_choices: int, *, is_stream: bool) -> None:
    """Notes what generation the current call asks for."""
    record = _current.get()
    if record is not None:
        record.parameters = parameters
        record.num_choices, record.is_stream = num_choices, is_stream


def note_answer(answer_id: str) -> None:
    """Notes the id of the current call's answer."""
    record = _current.get()
    if record is not None:
        record.answer_id = answer_id


def note_tokens(num_prompt: int, num_generated: int, num_cached: int = 0) -> None:
    """Adds the tokens of a text, as far as it came, to the current record."""
    record = _current.get()
    if record is not None:
        record.num_prompt_tokens += num_prompt
        record.num_generated_tokens += num_generated
        record.num_cached_tokens += num_cached


def note_text(text: str, finish_reason: str) -> None:
    """Adds how a text of the current call ended, and the text if traces shall have it."""
    record = _current.get()
    if record is not None:
        record.finish_reasons.append(finish_reason)
        if record.content is not None:
            record.content.outputs.append((text, finish_reason))


def note_prompt(text: str) -> None:
    """Notes a text that the current call asks to continue, if traces shall have it."""
    record = _current.get()
    if record is not None and record.content is not None and not record.content.is_conversation:
        record.content.input_messages.append(_message("user", text))


def note_conversation(messages: Iterable[tuple[str, str]]) -> None:
    """Notes the roles and texts of a conversation, if traces shall have them."""
    record = _current.get()
    if record is not None and record.content is not None:
        record.content.is_conversation = True
        record.content.input_messages = [_message(role, text) for role, text in messages]


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def note_error(error_type: str) -> None:
    """Notes that the current call fails."""
    record = _current.get()
    if record is not None:
        record.fail(error_type)


@contextmanager
def stage(name: str, *, from_begin: bool = False) -> Iterator[None]:
    """Notes a stage of the current call; `from_begin` counts it from when the call came."""
    record = _current.get()
    if record is None:
        yield
        return
    entry = Stage(name, record.began if from_begin else time.monotonic())
    record.stages.append(entry)
    try:
        yield
    except BaseException:
        entry.has_failed = True
        raise
    finally:
        entry.ended = time.monotonic()


class CallFilter(logging.Filter):
    """Gives log records `request_id`, `caller` and `trace_id`, which are empty outside of calls."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        call = _current.get()
        record.request_id = "" if call is None else call.request_id
        record.caller = "" if call is None else call.caller
        record.trace_id = "" if call is None else call.trace_id
        return True
