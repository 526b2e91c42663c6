"""What is noted of a call while it runs, for its log lines: who asked, and how many tokens it took.

Never its content. A handler's task and all that it starts see the same record.
"""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

REQUEST_ID_HEADER = "x-request-id"
_VALID_ID = re.compile(r"[!-~]{1,128}")  # visible ASCII: it goes into headers and log lines


@dataclass(slots=True)
class CallRecord:
    """The notes of one call.

    Attributes:
        request_id: the caller's, or one made here.
        caller: who asked, as `api/caller.py` names callers; equal for all calls of one caller.
        num_prompt_tokens: of all prompts, after truncation.
        num_generated_tokens: of all finished texts.
    """

    request_id: str
    caller: str = ""
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


_current: ContextVar[CallRecord | None] = ContextVar("call_record", default=None)


def begin_record(given_id: str | None, caller: str = "") -> CallRecord:
    """Starts the record of the current task's call, with the caller's id if it can be used."""
    is_valid = given_id is not None and _VALID_ID.fullmatch(given_id)
    request_id = given_id if given_id is not None and is_valid else uuid.uuid4().hex
    record = CallRecord(request_id, caller)
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


def note_tokens(num_prompt: int, num_generated: int) -> None:
    """Adds the tokens of a finished text to the current record."""
    record = _current.get()
    if record is not None:
        record.num_prompt_tokens += num_prompt
        record.num_generated_tokens += num_generated


class CallFilter(logging.Filter):
    """Gives log records `request_id` and `caller`, which are empty outside of calls."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        call = _current.get()
        record.request_id = "" if call is None else call.request_id
        record.caller = "" if call is None else call.caller
        return True
