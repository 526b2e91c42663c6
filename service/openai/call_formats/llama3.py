"""The form of Llama 3: an answer that is nothing but `{"name": "f", "parameters": {...}}`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..tools import Tool
from .call_format import Marker, Wanted, object_begin, object_call, object_schema
from .hermes import OBJECT_HEAD
from .marked_reader import MarkedReader, Marks
from .pieces import Reader

_TAG = "<|python_tag|>"
_KEYS = ("name", "type", "parameters", "arguments")
_BEGUN_TYPE = re.compile(r'\s*\{\s*"type"\s*:\s*(?:"(?P<type>[^"]*)(?P<end>")?|(?P<other>[^\s"]))')
_BEGUN_KEY = re.compile(r'\s*\{\s*(?:"(?P<key>[^"]*)(?P<end>")?)?')
_BEGUN_NAME = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>[^"\\]*)(?P<end>")?'
)
_DESCRIBED = re.compile(r'\{\\?"name\\?":[^{}]*\\?"parameters\\?":')  # as it tells the model
_MARKS = Marks(
    openings=(_TAG,),
    head=re.compile(r"\s*" + OBJECT_HEAD),
    next=re.compile(r"\s*\}\s*;?\s*(?=\{)"),
    end=re.compile(r"\s*\}\s*;?\s*(?=[^\s;{])"),
    is_bare=True,
    may_head=lambda text, names: _may_head(text, names),
    keeps_opening=False,
)


class Llama3:
    """The form of Llama 3."""

    name = "llama3"
    markers = frozenset({_TAG})

    def fits(self, template: str) -> bool:
        """Whether the template names the keys of a call, or the tag before one."""
        return _TAG in template or _DESCRIBED.search(template) is not None

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """Calls at the very beginning. Text that begins like none is free, with a brace too."""
        del template
        made: list[Any] = [object_call(tool, "parameters") for tool in wanted.tools]
        if wanted.or_json:
            made = [object_schema(tool, "parameters") for tool in wanted.tools]
        more = [{"repeat": ["; ", {"choice": made}]}] if wanted.many else []
        if not wanted.or_text:
            return [{"choice": made}, *more]
        # Each call is told from text by its own beginning.
        led = [[{"until": first, "before": "space"}, *rest] for first, *rest in made]
        tag = marker(_TAG)
        prefix = [] if isinstance(tag, str) else [{"optional": tag}]
        return [*prefix, {"choice": [{"text": "any"}, [{"choice": led}, *more]]}]

    def beginnings(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        """The object up to the arguments: an answer may be JSON with a name in it."""
        return tuple(object_begin(tool, "parameters") for tool in tools)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        """Objects that call none of these functions are text."""
        return MarkedReader(_MARKS, frozenset(tool.name for tool in tools))


def _may_head(text: str, names: frozenset[str] | None) -> bool:
    """Whether a text can be the beginning of a call, as far as its first key and the name tell."""
    named = _BEGUN_NAME.match(text)
    if named is not None and names is not None:
        return _is_begun(named["name"], names, is_whole=named["end"] is not None)
    typed = _BEGUN_TYPE.match(text)
    if typed is not None:
        is_whole = typed["end"] is not None
        return not typed["other"] and _is_begun(typed["type"], ("function",), is_whole=is_whole)
    begun = _BEGUN_KEY.match(text)
    if begun is None:
        return not text.strip()
    key, is_whole = begun["key"], begun["end"] is not None
    if key is None:
        return not text[begun.end() :]
    return _is_begun(key, _KEYS, is_whole=is_whole)


def _is_begun(text: str, words: Iterable[str], *, is_whole: bool) -> bool:
    """Whether a text is one of some words, or, if it is not whole, the beginning of one."""
    return any(word == text if is_whole else word.startswith(text) for word in words)
