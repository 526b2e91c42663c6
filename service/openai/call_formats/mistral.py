"""The forms of Mistral: `[TOOL_CALLS]` with a list of objects, or with `name[ARGS]{...}` each."""

from __future__ import annotations

import re
from typing import Any

from .call_format import Marker, Wanted, arguments_rule, object_call
from .hermes import opened
from .marked_form import MarkedForm
from .marked_reader import Marks

_BEGIN, _ARGS = "[TOOL_CALLS]", "[ARGS]"
_MARKS = Marks(
    openings=(_BEGIN,),
    head=re.compile(
        r'\s*(?:\[?\s*\{\s*"name"\s*:\s*)?(?P<name>"(?:[^"\\]|\\.)*"|[^\s"\[\]{},]+)'
        r'(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\]|\s*,\s*"(?:arguments|parameters)"\s*:)?\s*(?=\{)'
    ),
    next=re.compile(r"[^\[\]{}]*\}\s*,\s*(?=\{)"),
    end=re.compile(r"[^\[\]{}]*\}\s*\]"),
    bare_end=re.compile(r"\s*(?=\S)"),
)


class Mistral(MarkedForm):
    """The forms of Mistral; the newer one where the template has its marker."""

    name = "mistral"
    markers = frozenset({_BEGIN, _ARGS, "[CALL_ID]"})
    marks = _MARKS

    def fits(self, template: str) -> bool:
        """Whether the template has the marker."""
        return _BEGIN in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """Calls after the marker: one for all in the older form, one for each in the newer."""
        begin = marker(_BEGIN)
        calls: list[Any]
        if _ARGS in template:
            args = marker(_ARGS)
            made = [[tool.name, args, arguments_rule(tool)] for tool in wanted.tools]
            more = [{"repeat": [begin, {"choice": made}]}]
            calls = [{"choice": made}, *(more if wanted.many else [])]
        else:
            made = [object_call(tool, "arguments") for tool in wanted.tools]
            more = [{"repeat": [", ", {"choice": made}]}]
            calls = ["[", {"choice": made}, *(more if wanted.many else []), "]"]
        return opened(begin, calls, wanted)
