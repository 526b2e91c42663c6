"""TGI's form, for models whose template knows no tools: the prompt describes it to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..tool_calls import CallReader
from ..tools import Tool
from .call_format import Marker, Wanted
from .pieces import Content, Piece, Reader


class Tokenwire:
    """TGI's form: `{"function": {"_name": "f", "x": 1}}`."""

    name = "tokenwire"
    markers: frozenset[str] = frozenset()

    def fits(self, template: str) -> bool:
        """Any template: it is the last that is asked."""
        del template
        return True

    def is_described(self, template: str) -> bool:
        """Whether a template writes calls of this form itself."""
        return '"_name"' in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """None: the toolbox has a schema of the envelope."""
        del wanted, marker, template

    def beginnings(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        """The envelope up to the name."""
        names = (json.dumps(tool.name, ensure_ascii=False) for tool in tools)
        return tuple(f'{{"function": {{"_name": {name}' for name in names)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        """A grammar makes the envelope, whatever is called."""
        del tools
        return EnvelopeReader()


class EnvelopeReader:
    """Turns an envelope, or a text that is none, into pieces."""

    def __init__(self) -> None:
        self._calls = CallReader()
        self._is_text = False

    def push(self, text: str) -> list[Piece]:
        """What the next piece of the text adds."""
        if self._is_text:
            return [Content(text)]
        calls = self._calls.push(text)
        if not self._calls.is_text:
            return [*calls]
        self._is_text = True
        return [Content(self._calls.take_text())]

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """A text in which no call was begun."""
        held = "" if self._calls.is_named else self._calls.take_text()
        is_begun = is_cut and held.lstrip().startswith("{")
        return [Content(held)] if held and not is_begun else []
