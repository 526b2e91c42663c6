"""What happens in a streamed response."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ServiceError
from .item import Item, ScoredTokens
from .response import Response


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event. What is None is no part of it.

    Attributes:
        type: OpenAI's name of it.
        number: its place in the stream, from 0.
        response: the answer so far.
        output_index: the number of the item that it is about.
        item: that item.
        is_part: whether it is about the text of the item, and not about the item itself.
        delta: what is added to a text or to arguments.
        logprobs: of the tokens of a text.
        failure: what went wrong.
    """

    type: str
    number: int
    response: Response | None = None
    output_index: int | None = None
    item: Item | None = None
    is_part: bool = False
    delta: str | None = None
    logprobs: ScoredTokens = ()
    failure: ServiceError | None = None
