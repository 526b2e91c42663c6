"""The form of Hermes and Qwen: `<tool_call>`, an object, `</tool_call>`, once for each call."""

from __future__ import annotations

import re
from typing import Any

from .call_format import Marker, Wanted, object_call
from .marked_form import MarkedForm
from .marked_reader import Marks

_BEGIN, _END = "<tool_call>", "</tool_call>"

# `{"name": "f", "arguments": `, up to the brace of the arguments.
OBJECT_HEAD = (
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MARKS = Marks(
    openings=(_BEGIN,),
    head=re.compile(r"\s*" + OBJECT_HEAD),
    next=re.compile("(?!)"),  # every call has its own opening
    end=re.compile(f"(?s:.*?){_END}"),
    closing=_END,
)


class Hermes(MarkedForm):
    """The form of Hermes and Qwen."""

    name = "hermes"
    markers = frozenset({_BEGIN, _END})
    marks = _MARKS

    def fits(self, template: str) -> bool:
        """Whether the template shows the markers and a JSON object between them."""
        return _BEGIN in template and "<function=" not in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """Calls on lines of their own."""
        del template
        begin, end = marker(_BEGIN), marker(_END)
        made = [["\n", *object_call(tool, "arguments"), "\n", end] for tool in wanted.tools]
        return on_lines(begin, made, wanted)


def on_lines(begin: Any, made: list[Any], wanted: Wanted) -> Any:
    """Calls that each have an opening, one of the rules in `made`, and a line of their own."""
    call = {"choice": made}
    calls = [call, {"repeat": ["\n", begin, call]}] if wanted.many else [call]
    return opened(begin, calls, wanted)


def opened(begin: Any, calls: list[Any], wanted: Wanted) -> Any:
    """Calls behind their opening, or any text in which they begin where that is met."""
    if not wanted.or_text:
        return [begin, *calls]
    if isinstance(begin, str):
        return {"choice": [{"text": "any"}, [{"until": begin, "before": "any"}, *calls]]}
    return [{"text": "any"}, {"optional": [begin, *calls]}]
