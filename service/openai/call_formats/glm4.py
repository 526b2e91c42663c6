"""The form of GLM 4.5 and later: `<tool_call>f`, then `<arg_key>` and `<arg_value>` in turns."""

from __future__ import annotations

import re
from typing import Any

from ..tools import Tool
from .argument_pairs import parameters_of
from .call_format import Marker, Wanted
from .hermes import on_lines
from .marked_form import PairForm
from .pair_reader import PairMarks

_BEGIN, _END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_MARKS = PairMarks(
    opening=_BEGIN,
    name_opening="",
    name=re.compile(r"\s*(?P<name>[^\s<>{}\"]+)\s*(?=<)"),
    key_opening=_KEY,
    key=re.compile(rf"{_KEY}(?P<key>[^<>\n]+){_KEY_END}\s*{_VALUE}"),
    value_end=_VALUE_END,
    has_lines=False,
    end=_END,
    closing="",
)


class Glm4(PairForm):
    """The form of GLM 4.5 and later."""

    name = "glm4"
    markers = frozenset({_BEGIN, _END, _KEY, _KEY_END, _VALUE, _VALUE_END})
    marks = _MARKS

    def fits(self, template: str) -> bool:
        """Whether the template has the markers of arguments."""
        return _KEY in template and _VALUE in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """Calls with their arguments on lines of their own, in the order of the tool's schema."""
        del template
        begin, end = marker(_BEGIN), marker(_END)
        made = [
            [f"{tool.name}\n", *_arguments(index, tool, marker), end]
            for index, tool in enumerate(wanted.tools)
        ]
        return on_lines(begin, made, wanted)


def _arguments(index: int, tool: Tool, marker: Marker) -> list[Any]:
    key, key_end, value, value_end = map(marker, (_KEY, _KEY_END, _VALUE, _VALUE_END))
    return [
        one.given([key, one.name, key_end, "\n", value, one.ended(value_end), "\n"])
        for one in parameters_of(index, tool)
    ]
