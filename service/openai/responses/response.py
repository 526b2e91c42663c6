"""An answer in the shape of OpenAI's Responses API, whole or so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import ServiceError
from ..head import Head
from ..usage import Usage
from .item import Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer.

    Attributes:
        head: id, time and model.
        status: how far it is; `incomplete` means that it has as many tokens as it may have.
        items: its parts.
        usage: tokens that it took; None before its end.
        num_reasoning_tokens: of the generated tokens, those of reasoning.
        failure: why it failed.
        repeated: fields of the request, as JSON, that it repeats.
    """

    head: Head
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    items: tuple[Item, ...] = ()
    usage: Usage | None = None
    num_reasoning_tokens: int = 0
    failure: ServiceError | None = None
    repeated: Mapping[str, Any]
