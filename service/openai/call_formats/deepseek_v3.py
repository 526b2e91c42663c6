"""The forms of DeepSeek: calls between markers, with their arguments in a code block in V3."""

from __future__ import annotations

import re
from typing import Any

from .call_format import Marker, Wanted, arguments_rule
from .hermes import opened
from .marked_form import MarkedForm
from .marked_reader import Marks

_ALL_BEGIN, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_BEGIN, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_MARKS = Marks(
    openings=(_ALL_BEGIN,),
    head=re.compile(
        rf"\s*{_BEGIN}(?:function{_SEP})?(?P<name>[^<\n{{]+?)(?:{_SEP})?\s*(?:```json\s*)?(?=\{{)"
    ),
    next=re.compile(rf"(?s:(?:(?!{_ALL_END}).)*?){_END}\s*(?={_BEGIN})"),
    end=re.compile(rf"(?s:.*?){_ALL_END}"),
    closing=_ALL_END,
)


class DeepSeekV3(MarkedForm):
    """The forms of DeepSeek V3, and of V3.1 where the template has no code blocks."""

    name = "deepseek_v3"
    markers = frozenset({_ALL_BEGIN, _ALL_END, _BEGIN, _SEP, _END})
    marks = _MARKS

    def fits(self, template: str) -> bool:
        """Whether the template has the marker."""
        return _ALL_BEGIN in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """Calls between markers."""
        in_block = "```json" in template
        made = [self._call(tool, marker, in_block=in_block) for tool in wanted.tools]
        call = [marker(_BEGIN), {"choice": made}, marker(_END)]
        gap = ["\n"] if in_block else []
        more = [{"repeat": [*gap, *call]}] if wanted.many else []
        calls = [*call, *more, marker(_ALL_END)]
        begin = marker(_ALL_BEGIN)
        return opened(begin, calls, wanted)

    def _call(self, tool: Any, marker: Marker, *, in_block: bool) -> list[Any]:
        arguments = arguments_rule(tool)
        if not in_block:
            return [tool.name, marker(_SEP), arguments]
        return ["function", marker(_SEP), f"{tool.name}\n```json\n", arguments, "\n```"]
