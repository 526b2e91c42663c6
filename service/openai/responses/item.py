"""The parts of a response: what the model thought, what it says, and what it calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...generation.generation import Token

Status = Literal["in_progress", "completed", "incomplete"]
ItemKind = Literal["reasoning", "message", "function_call"]
ScoredTokens = tuple[tuple[Token, Sequence[Token]], ...]  # each with the likeliest at its place

_PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One part of a response.

    Attributes:
        id: its own.
        kind: what it is.
        status: how far it is.
        text: of a message or of reasoning; None before it has any.
        logprobs: of the text's tokens, if they were asked for.
        call_id: of a call: the name that its output refers to.
        name: of a call: the function.
        arguments: of a call: JSON, up to the cut if it was cut off.
    """

    id: str
    kind: ItemKind
    status: Status = "in_progress"
    text: str | None = None
    logprobs: ScoredTokens = ()
    call_id: str = ""
    name: str = ""
    arguments: str = ""


def item_id(kind: ItemKind, response_id: str, index: int) -> str:
    """The id of the item number `index` of a response."""
    return f"{_PREFIXES[kind]}{response_id.partition('_')[2]}{index:04x}"
