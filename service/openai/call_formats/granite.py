"""The form of Granite 3: `<|tool_call|>` with a list of objects."""

from __future__ import annotations

import re
from typing import Any

from .call_format import Marker, Wanted, object_call
from .hermes import OBJECT_HEAD, opened
from .marked_form import MarkedForm
from .marked_reader import Marks

_BEGIN = "<|tool_call|>"
_MARKS = Marks(
    openings=(_BEGIN,),
    head=re.compile(r"\s*\[?\s*" + OBJECT_HEAD),
    next=re.compile(r"[^\[\]{}]*\}\s*,\s*(?=\{)"),
    end=re.compile(r"[^\[\]{}]*\}\s*\]"),
)


class Granite(MarkedForm):
    """The form of Granite 3."""

    name = "granite"
    markers = frozenset({_BEGIN})
    marks = _MARKS

    def fits(self, template: str) -> bool:
        """Whether the template has the marker."""
        return _BEGIN in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """A list of calls after the marker."""
        del template
        made = {"choice": [object_call(tool, "arguments") for tool in wanted.tools]}
        more = [{"repeat": [", ", made]}] if wanted.many else []
        begin, calls = marker(_BEGIN), ["[", made, *more, "]"]
        return opened(begin, calls, wanted)
