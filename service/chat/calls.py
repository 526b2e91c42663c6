"""Calls of tools: made of the parts that a stream has, and shown to people and programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CallPart:
    """A part of a call; what it does not have is empty.

    Attributes:
        index: which of the answer's calls, from 0.
        id: its name within the conversation.
        name: of the tool.
        arguments: the next piece of their JSON.
    """

    index: int = 0
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A call: its id, the tool's name, and the arguments as JSON."""

    id: str
    name: str
    arguments: str

    @property
    def message(self) -> dict[str, Any]:
        """The call within the assistant's turn."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    @property
    def line(self) -> str:
        """The call for a program, as one line of JSON."""
        try:
            arguments = json.loads(self.arguments)
        except ValueError:
            arguments = self.arguments
        fields = {"id": self.id, "name": self.name, "arguments": arguments}
        return json.dumps(fields, ensure_ascii=False)


def call_parts(delta: dict[str, Any]) -> tuple[CallPart, ...]:
    """The parts of calls in a part of an answer."""
    parts = []
    for item in delta.get("tool_calls") or ():
        function = item.get("function") or {}
        parts.append(
            CallPart(
                item.get("index") or 0,
                item.get("id") or "",
                function.get("name") or "",
                function.get("arguments") or "",
            )
        )
    return tuple(parts)


def whole_calls(parts: Iterable[CallPart]) -> list[Call]:
    """The calls of an answer, in their order."""
    by_index: dict[int, list[CallPart]] = {}
    for part in parts:
        by_index.setdefault(part.index, []).append(part)
    return [
        Call(
            next((part.id for part in group if part.id), ""),  # over gRPC all parts have it
            next((part.name for part in group if part.name), ""),
            "".join(part.arguments for part in group),
        )
        for _, group in sorted(by_index.items())
    ]
