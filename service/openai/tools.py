"""Functions that a model may call: the choice of them, the prompt about them, the form of a call.

A call is JSON in an envelope, as in TGI (router/src/infer/mod.rs at v2.1.1, ToolGrammar):
`{"function": {"_name": "get_weather", "location": "Paris"}}`, the name first, then the arguments in
the order of their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ErrorKind, ServiceError
from ..grammar.depth import MAX_DEPTH, is_deeper
from ..grammar.spec import Grammar
from ..workers.courtesy import giving_way

# TGI's default: router/src/lib.rs at v2.1.1, default_tool_prompt.
DEFAULT_TOOL_PROMPT = (
    "\nYou will be presented with a JSON schema representing a set of tools.\nIf the user request "
    "lacks of sufficient information to make a precise tool selection: Do not invent any tool's "
    "properties, instead notify with an error message.\n\nJSON Schema:\n"
)
_NAME = "_name"
_IDENTITIES = ("$id", "$schema")
_NOT_INSIDE = ("$ref", "$defs", "definitions")  # not copied into the envelope
_COMBINATIONS = ("anyOf", "oneOf", "allOf")
_ENVELOPE_LEVELS = 4  # of objects and lists around the schema of a tool
_MAX_HOPS = 8  # of references at the top of a schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function, with the JSON Schema of its arguments.

    Attributes:
        by_contract: whether the schema came under the contract's key, `arguments`, and not under
            OpenAI's, `parameters`.
    """

    name: str
    description: str | None = None
    parameters: Any = None
    by_contract: bool = False

    def definition(self) -> dict[str, Any]:
        """In OpenAI's form, which chat templates expect."""
        function = {
            "name": self.name,
            "description": self.description or "",
            "parameters": self.parameters if isinstance(self.parameters, dict) else {},
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolbox:
    """The tools in force for one answer. With `may_answer` the model may also answer in text.

    `many` says whether it may make several calls, where its form of calls has that.
    """

    tools: tuple[Tool, ...]
    may_answer: bool
    many: bool = True

    @classmethod
    def choose(cls, tools: Sequence[Tool], choice: Any, *, many: bool = True) -> Toolbox | None:
        """The tools that a `tool_choice` allows; None if there are none. One by name is one call.

        Raises:
            ServiceError: the choice names no tool, or is no choice.
        """
        _check(tools)
        if not tools or choice == "none":
            return None
        if choice is None or choice == "auto":
            return cls(tools=tuple(tools), may_answer=True, many=many)
        if choice == "required":
            return cls(tools=tuple(tools), may_answer=False, many=many)
        name = _chosen_name(choice)
        chosen = tuple(tool for tool in tools if tool.name == name)
        if not chosen:
            raise ServiceError(
                ErrorKind.TOOL, f"Tool with name {name} not found", field="tool_choice"
            )
        return cls(tools=chosen, may_answer=False, many=False)

    def grammar(self) -> Grammar:
        """What an answer must look like."""
        return Grammar(
            kind="json",
            value=self.schema(),
            or_text=self.may_answer,
            num_levels=_ENVELOPE_LEVELS,
            places=tuple(self._places()),
        )

    def _places(self) -> Iterator[tuple[str, str]]:
        """Where the tools' schemas are in that of a call, and what a caller knows them by."""
        for index in range(len(self.tools)):
            path = f"tools[{index}].function.parameters"
            call = f"/anyOf/{index}" if len(self.tools) > 1 else ""
            yield f"#/properties/function{call}", path
            yield f"#/$defs/{index}", path

    def schema(self) -> dict[str, Any]:
        """JSON Schema of a call.

        Raises:
            ServiceError: a tool's schema cannot be put into the envelope.
        """
        definitions: dict[str, Any] = {}
        calls = [
            _call_schema(index, tool, definitions)
            for index, tool in enumerate(giving_way(self.tools))
        ]
        envelope: dict[str, Any] = {
            "type": "object",
            "properties": {"function": calls[0] if len(calls) == 1 else {"anyOf": calls}},
            "required": ["function"],
            "additionalProperties": False,
        }
        if definitions:
            envelope["$defs"] = definitions
        return envelope

    def prompt(self, tool_prompt: str | None, *, has_envelope: bool = True) -> str:
        """The text about the tools, for a template that does not render them.

        `has_envelope` says that calls have TGI's form, which this text must describe.
        """
        text = DEFAULT_TOOL_PROMPT if tool_prompt is None else tool_prompt
        described: Any = [tool.definition() for tool in self.tools]
        if has_envelope:
            described = self.schema()
        return f"\n---\n{text}\n{json.dumps(described, ensure_ascii=False)}"


def enclosed(schema: dict[str, Any], root: str) -> dict[str, Any]:
    """A copy of a schema for the path `root` of a document, in which its references hold."""
    moved: dict[str, Any] = _moved(_without_identity(schema), root)
    return moved


def _check(tools: Sequence[Tool]) -> None:
    """Checks the tools themselves.

    Raises:
        ServiceError: one has no name, or two have the same.
    """
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        path = f"tools[{index}].function.name"
        if not tool.name:
            raise ServiceError(ErrorKind.SHAPE, f"{path}: missing field `name`", field=path)
        if tool.name in seen:
            raise ServiceError(ErrorKind.TOOL, f"two tools have the name {tool.name}", field=path)
        seen.add(tool.name)


def _chosen_name(choice: Any) -> str:
    if isinstance(choice, str):
        return choice
    if isinstance(choice, dict) and isinstance(function := choice.get("function"), dict):
        name = function.get("name")
        if isinstance(name, str):
            return name
    raise ServiceError(
        ErrorKind.SHAPE,
        "tool_choice: data did not match any variant of untagged enum ToolType",
        field="tool_choice",
    )


def _call_schema(index: int, tool: Tool, definitions: dict[str, Any]) -> dict[str, Any]:
    """The object inside the envelope; what it refers to is added to `definitions`."""
    given = _without_identity(tool.parameters if isinstance(tool.parameters, dict) else {})
    path = f"tools[{index}].function.parameters"
    if is_deeper(given):
        raise _bad_schema(path, f"is nested more than {MAX_DEPTH} deep")
    top = _followed(given, path)
    if any(key in top for key in _COMBINATIONS):
        raise _bad_schema(path, "must list its properties at the top")
    root = f"#/$defs/{index}"
    if _refers(given):  # to any part of itself, so that all of it is needed
        definitions[str(index)] = _moved(given, root)
    moved = _moved({key: top[key] for key in top if key not in _NOT_INSIDE}, root)
    properties = _object(moved.pop("properties", {}), f"{path}.properties")
    required = moved.pop("required", [])
    if not isinstance(required, list):
        raise _bad_schema(f"{path}.required", "is not a list")
    if _NAME in properties:
        raise _bad_schema(f"{path}.properties", f"has the reserved name {_NAME}")
    if "additionalProperties" not in moved and "patternProperties" not in moved:
        undeclared: dict[str, Any] = {name: {} for name in required if isinstance(name, str)}
        properties = {**undeclared, **properties}
    return {
        "additionalProperties": False,
        **moved,
        "type": "object",
        "properties": {
            _NAME: {"const": tool.name},
            **{key: properties[key] for key in sorted(properties)},
        },
        "required": [_NAME, *required],
    }


def _without_identity(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without a name of its own, to whose parts its references point from its root."""
    identity = schema.get("$id")
    kept = {key: value for key, value in schema.items() if key not in _IDENTITIES}
    return _relative(kept, identity.removesuffix("#")) if isinstance(identity, str) else kept


def _relative(schema: Any, identity: str) -> Any:
    if isinstance(schema, list):
        return [_relative(item, identity) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _relative(value, identity) for key, value in schema.items()}
    reference = result.get("$ref")
    if isinstance(reference, str) and reference.partition("#")[0] == identity:
        result["$ref"] = f"#{reference.partition('#')[2]}"
    return result


def _followed(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema that the references at the top of one lead to."""
    top = schema
    for _ in range(_MAX_HOPS):
        reference = top.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return top
        target: Any = schema
        for part in reference.removeprefix("#/").split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, dict) else None
        top = _object(target, f"{path}.$ref")
    raise _bad_schema(f"{path}.$ref", "refers to itself")


def _refers(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(_refers(item) for item in schema)
    return isinstance(schema, dict) and ("$ref" in schema or any(map(_refers, schema.values())))


def _moved(schema: Any, root: str) -> Any:
    """A copy of a schema for the path `root` of a document, to which its references are changed."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _moved(value, root) for key, value in schema.items()}
    reference = result.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        result["$ref"] = root + reference.removeprefix("#")
    return result


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad_schema(path, "is not an object")
    return value


def _bad_schema(path: str, what: str) -> ServiceError:
    return ServiceError(ErrorKind.TOOL, f"{path} {what}", field=path)
