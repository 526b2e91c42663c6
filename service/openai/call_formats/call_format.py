"""What a form of tool calls has to say about itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..tools import Tool, enclosed
from .pieces import Reader

# A text as a part of a rule: the token of that text where the tokenizer has one, else the text.
Marker = Callable[[str], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The calls that an answer may have.

    Attributes:
        tools: what may be called.
        or_text: whether the answer may be text as well.
        many: whether there may be several calls.
        or_json: whether the answer may be JSON as well, of a grammar beside that of calls.
    """

    tools: Sequence[Tool]
    or_text: bool
    many: bool = True
    or_json: bool = False


class CallFormat(Protocol):
    """A form in which models write calls."""

    @property
    def name(self) -> str:
        """Its name in settings."""

    @property
    def markers(self) -> frozenset[str]:
        """Texts of special tokens that have to be read, though they are no part of an answer."""

    def fits(self, template: str) -> bool:
        """Whether a chat template makes calls of this form."""

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """What an answer must look like, as `engine/grammar/rule_source.py` reads it."""

    def beginnings(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        """How calls begin, by which they are told from an answer of a given form.

        Empty where the form has another place for such an answer.
        """

    def reader(self, tools: Sequence[Tool]) -> Reader:
        """Reads an answer in which these may be called."""


def arguments_rule(tool: Tool) -> dict[str, Any]:
    """The rule of a call's arguments: an object, closed unless its schema says otherwise."""
    given = tool.parameters if isinstance(tool.parameters, dict) else {}
    is_closed = not any(key in given for key in ("$ref", "anyOf", "oneOf", "allOf"))
    listed: dict[str, Any] = {"properties": {}} if is_closed else {}  # so that it is closed
    return {"schema": {**listed, **given, "type": "object"}, "of": tool.name}


def up_to(mark: Any) -> list[Any]:
    """The rule of any text with the first mark behind it, which is a text or a token."""
    if isinstance(mark, str):
        return [{"until": mark, "before": "any"}]
    return [{"text": "any"}, mark]


def object_call(tool: Tool, key: str) -> list[Any]:
    """The rule of `{"name": "f", "arguments": {...}}`, in which `key` may have another name."""
    return [object_begin(tool, key), arguments_rule(tool), "}"]


def object_schema(tool: Tool, key: str) -> dict[str, Any]:
    """The same rule as a schema, where a text may be other JSON that begins alike.

    The library splits a text into the longest parts that any rule has: a beginning as one text
    would take that of the other JSON for its own.
    """
    arguments = enclosed(arguments_rule(tool)["schema"], "#/$defs/arguments")
    schema = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, key: {"$ref": "#/$defs/arguments"}},
        "required": ["name", key],
        "additionalProperties": False,
        "$defs": {"arguments": arguments},
    }
    return {"schema": schema, "of": tool.name}


def object_begin(tool: Tool, key: str) -> str:
    """The beginning of such a call."""
    return f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
