"""The form of Qwen3-Coder: `<function=f>` and a `<parameter=key>` for each argument, as text."""

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
_MARKS = PairMarks(
    opening=_BEGIN,
    name_opening="<function=",
    name=re.compile(r"\s*<function=(?P<name>[^\s<>{}\"]+)>"),
    key_opening="<parameter=",
    key=re.compile(r"<parameter=(?P<key>[^<>\n]+)>(?:\n|(?=[^\n]))"),
    value_end="</parameter>",
    has_lines=True,
    end="</function>",
    closing=_END,
)


class Qwen3Coder(PairForm):
    """The form of Qwen3-Coder."""

    name = "qwen3_coder"
    markers = frozenset({_BEGIN, _END})
    marks = _MARKS

    def fits(self, template: str) -> bool:
        """Whether the template shows how functions and their parameters are written."""
        return "<function=" in template and "<parameter=" in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """Calls on lines of their own, each argument too, in the order of the tool's schema."""
        del template
        begin, end = marker(_BEGIN), marker(_END)
        made = [
            [f"\n<function={tool.name}>\n", *_arguments(index, tool), "</function>\n", end]
            for index, tool in enumerate(wanted.tools)
        ]
        return on_lines(begin, made, wanted)


def _arguments(index: int, tool: Tool) -> list[Any]:
    return [
        one.given([f"<parameter={one.name}>\n", one.ended("\n</parameter>\n")])
        for one in parameters_of(index, tool)
    ]
