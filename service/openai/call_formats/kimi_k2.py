"""The form of Kimi K2: calls in a section of their own, each with an id that counts them."""

from __future__ import annotations

import re
from typing import Any

from .call_format import Marker, Wanted, arguments_rule
from .hermes import opened
from .marked_form import MarkedForm
from .marked_reader import Marks

_ALL_BEGIN, _ALL_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_BEGIN, _END = "<|tool_call_begin|>", "<|tool_call_end|>"
_ARGUMENTS = "<|tool_call_argument_begin|>"
_MARKS = Marks(
    openings=(_ALL_BEGIN,),
    head=re.compile(
        rf"\s*{re.escape(_BEGIN)}\s*(?:functions\.)?(?P<name>[^\s<>{{}}:]+)(?::\d+)?\s*"
        rf"{re.escape(_ARGUMENTS)}\s*(?=\{{)"
    ),
    next=re.compile(rf"\s*{re.escape(_END)}\s*(?={re.escape(_BEGIN)})"),
    end=re.compile(rf"(?s:.*?){re.escape(_ALL_END)}"),
    closing=_ALL_END,
)
_DIGITS = "0123456789"


class KimiK2(MarkedForm):
    """The form of Kimi K2."""

    name = "kimi_k2"
    markers = frozenset({_ALL_BEGIN, _ALL_END, _BEGIN, _END, _ARGUMENTS})
    marks = _MARKS

    def fits(self, template: str) -> bool:
        """Whether the template has the marker."""
        return _ALL_BEGIN in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """Calls between markers; the number of a call is of two digits at most."""
        del template
        number = [{"choice": list(_DIGITS)}, {"optional": {"choice": list(_DIGITS)}}]
        made = [
            [f"functions.{tool.name}:", *number, marker(_ARGUMENTS), arguments_rule(tool)]
            for tool in wanted.tools
        ]
        call = [marker(_BEGIN), {"choice": made}, marker(_END)]
        calls = [*call, {"repeat": call}] if wanted.many else call
        begin = marker(_ALL_BEGIN)
        calls = [*calls, marker(_ALL_END)]
        return opened(begin, calls, wanted)
