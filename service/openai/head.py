"""What every answer of OpenAI's endpoints begins with, and every part of a stream."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Literal, Self

from ..call_record import note_answer
from ..generation.adapters import PLACEHOLDERS
from ..generation.server_info import ServerInfo

_MAX_ECHO = 256  # characters: every part of a stream repeats the name


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The same in all parts of an answer.

    Attributes:
        id: of this answer, unlike all others.
        created: when the answer began, in seconds since 1970.
        model: the name by which the caller called the model, or its own.
        system_fingerprint: the version and the build.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def begin(
        cls,
        prefix: Literal["chatcmpl-", "cmpl-", "resp_"],
        asked_model: str | None,
        server: ServerInfo,
    ) -> Self:
        """The head of a new answer to a request that names a model, or none; its call notes it."""
        head = cls(
            id=f"{prefix}{secrets.token_hex(16)}",
            created=int(time.time()),
            model=_echoed(asked_model) or server.model_id,
            system_fingerprint=server.system_fingerprint,
        )
        note_answer(head.id)
        return head


def _echoed(name: str | None) -> str:
    """A caller's name of the model, if answers repeat it: a placeholder stands for its own."""
    if name is None or name in PLACEHOLDERS or len(name) > _MAX_ECHO:
        return ""
    return name
