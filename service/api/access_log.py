"""One log line for each call: what was asked, how it ended, how long it took. Never its content."""

from __future__ import annotations

import logging
from typing import Any

from ..call_record import CallRecord
from ..log_lines import FIELDS

logger = logging.getLogger("service.access")


def log_access(record: CallRecord, method: str, path: str, code: str, seconds: float) -> None:
    """Logs a call that has ended.

    Args:
        record: the call's.
        method: the RPC's full name.
        path: what the caller asked for: a REST path, or again the RPC's full name.
        code: the name of its status.
        seconds: how long it took.
    """
    fields = {
        "caller": record.caller,
        "path": path,
        "method": method.rpartition("/")[2],
        "status": code,
        "seconds": round(seconds, 6),
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "generated_tokens": record.num_generated_tokens,
        **_timings(record),
    }
    if record.error_type:  # which the status may not tell: a stream's comes after its headers
        fields["error"] = record.error_type
    logger.info("%s", _text(fields), extra={FIELDS: fields})


def _timings(record: CallRecord) -> dict[str, float]:
    """The parts of a generation's time, in seconds, as far as it came."""
    timings = record.timings()
    given = {
        "queue_seconds": timings.queue,
        "first_token_seconds": timings.first_token,
        "inference_seconds": timings.inference,
    }
    return {name: round(value, 6) for name, value in given.items() if value is not None}


def _text(fields: dict[str, Any]) -> str:
    """The line for people."""
    text = (
        "{method} {path} {status} {seconds:.3f} s, tokens {prompt_tokens} in {generated_tokens} out"
    ).format(**fields)
    if "first_token_seconds" in fields:
        text += f", first after {fields['first_token_seconds']:.3f} s"
    return f"{text}, {fields['error']}" if "error" in fields else text
