"""One log line for each call: what was asked, how it ended, how long it took. Never its content."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ..call_record import current_record
from .call import ORIGINAL_PATH

logger = logging.getLogger("service.access")


def log_access(
    method: str, code: str, seconds: float, metadata: Iterable[tuple[str, str | bytes]] | None
) -> None:
    """Logs a call that has ended.

    Args:
        method: the RPC's full name.
        code: the name of its status.
        seconds: how long it took.
        metadata: the caller's, of which only the REST path is used.
    """
    record = current_record()
    path = dict(metadata or ()).get(ORIGINAL_PATH, method)
    name = path.decode(errors="replace") if isinstance(path, bytes) else path
    fields = {
        "path": name.partition("?")[0],
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
