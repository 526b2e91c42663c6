"""One log line for each call: what was asked, how it ended, how long it took. Never its content."""

from __future__ import annotations

import logging

from ..call_record import current_record

logger = logging.getLogger("service.access")


def log_access(method: str, path: str, code: str, seconds: float) -> None:
    """Logs a call that has ended.

    Args:
        method: the RPC's full name.
        path: what the caller asked for: a REST path, or again the RPC's full name.
        code: the name of its status.
        seconds: how long it took.
    """
    record = current_record()
    fields = {
        "caller": "" if record is None else record.caller,
        "path": path,
        "method": method.rpartition("/")[2],
        "status": code,
        "seconds": round(seconds, 6),
        "prompt_tokens": 0 if record is None else record.num_prompt_tokens,
        "generated_tokens": 0 if record is None else record.num_generated_tokens,
    }
    logger.info(
        "%(method)s %(path)s %(status)s %(seconds).3f s, tokens %(prompt_tokens)d in "
        "%(generated_tokens)d out",
        fields,
        extra={"access": fields},
    )
