"""Arguments that come one by one, each as plain text behind its name: what each may be, and is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ErrorKind, ServiceError
from ..tools import Tool, enclosed

_KINDS = frozenset(("null", "boolean", "number", "string", "array", "object"))
_SAYS_NOTHING = frozenset(("title", "description", "default", "examples", "deprecated", "$comment"))
_OF_STRINGS = frozenset(("type", "pattern", "minLength", "maxLength", "format"))
# Keywords of an object that are said by which names there are.
_OF_OBJECTS = _SAYS_NOTHING | {
    "type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema",
    "$id", "strict",
}  # fmt: skip
_OF_PYTHON = {"True": "true", "False": "false", "None": "null"}  # as some templates render them
_MAX_HOPS = 8  # of references
_MAX_BRANCHES = 64  # of choices of one value, those in choices too


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of a tool's arguments.

    Attributes:
        name: of the argument.
        schema: what a value must fit, with references from `root`.
        root: the schema of all arguments of the tool.
        function: the tool's name.
        is_required: whether a call must have it.
    """

    name: str
    schema: Any
    root: Mapping[str, Any]
    function: str = ""
    is_required: bool = False

    @property
    def is_text(self) -> bool:
        """Whether a value can be nothing but a string."""
        return self._kinds(self.schema) == {"string"}

    def json_of(self, text: str) -> str:
        """The JSON of a value: a string is written as it is, any other value as JSON."""
        written = text.strip()
        written = _OF_PYTHON.get(written, written)
        kind = _kind_of(written)
        if kind is not None and kind in self._read_kinds():
            return written
        return json.dumps(text, ensure_ascii=False)

    def given(self, rule: Any) -> Any:
        """The rule of a call that has this argument, as `rule` writes it, or may go without it."""
        return rule if self.is_required else {"optional": rule}

    def ended(self, end: Any) -> Any:
        """The rule of a value up to its end, which is a text or a token.

        Raises:
            ServiceError: it cannot be said.
        """
        branches = self._branches(self.schema)
        if any(self._is_any_text(branch) for branch in branches):
            return _ended({"string": {}}, end)
        rules = [_ended(rule, end) for branch in branches for rule in self._rules(branch)]
        return {"choice": rules}

    def _read_kinds(self) -> frozenset[str]:
        """The types that a value may be read as: beside any string only those that are free."""
        branches = self._branches(self.schema)
        if any(self._is_any_text(branch) for branch in branches):
            branches = [branch for branch in branches if _is_bare(branch)]
        kinds = [self._kinds(branch) for branch in branches]
        return frozenset[str]().union(*kinds) - {"string"}

    def _rules(self, schema: Any) -> Iterator[Any]:
        """What a value may be: {"string": schema} is text that is not in quotation marks."""
        if (values := _listed(schema)) is not None:
            yield from (value if isinstance(value, str) else json.dumps(value) for value in values)
            return
        kinds = self._kinds(schema)
        if "string" not in kinds:
            root = enclosed(dict(self.root), "#/$defs/arguments")
            inner = enclosed({"of": schema}, "#/$defs/arguments")["of"]
            yield {"schema": {**inner, "$defs": {"arguments": root}}, "of": self.function}
            return
        keys = schema.keys() - _SAYS_NOTHING
        if kinds != {"string"} or not keys <= _OF_STRINGS:
            words = ", ".join(sorted(keys - {"type"}))
            text = (
                f"{self.name}: {words} of a string cannot be enforced in the model's form of calls"
            )
            raise ServiceError(ErrorKind.TOOL, text, field="tools")
        yield {"string": schema, "of": self.function}

    def _branches(self, given: Any) -> list[Any]:
        """The schemas of which a value must fit one.

        Raises:
            ServiceError: they are too many.
        """
        branches, waiting = [], [given]
        for one in waiting:  # grows
            if len(waiting) > _MAX_BRANCHES:
                text = f"{self.name} has more than {_MAX_BRANCHES} choices"
                raise ServiceError(ErrorKind.TOOL, text, field="tools")
            schema = self._followed(one)
            keys = schema.keys() - _SAYS_NOTHING if isinstance(schema, dict) else set()
            inner = schema[next(iter(keys))] if keys in ({"anyOf"}, {"oneOf"}) else None
            if isinstance(inner, list):
                waiting += inner
            else:
                branches.append(schema)
        return branches

    def _followed(self, schema: Any) -> Any:
        for _ in range(_MAX_HOPS):
            if not isinstance(schema, dict) or schema.keys() - _SAYS_NOTHING != {"$ref"}:
                return schema
            target: Any = self.root
            for part in str(schema["$ref"]).removeprefix("#").split("/")[1:]:
                name = part.replace("~1", "/").replace("~0", "~")
                target = target.get(name, {}) if isinstance(target, dict) else {}
            schema = target
        return {}

    def _kinds(self, given: Any) -> frozenset[str]:
        kinds: set[str] = set()
        for schema in self._branches(given):
            if not isinstance(schema, dict) or not schema:
                return _KINDS
            if (values := _listed(schema)) is not None:
                kinds |= {_kind_of(json.dumps(value)) or "string" for value in values}
                continue
            types = schema.get("type", list(_KINDS))
            names = [types] if isinstance(types, str) else types
            kinds |= {"number" if name == "integer" else str(name) for name in names}
        return frozenset(kinds)

    def _is_any_text(self, schema: Any) -> bool:
        return _is_bare(schema) and "string" in self._kinds(schema)


def parameters_of(index: int, tool: Tool) -> list[Parameter]:
    """The arguments that a tool may have, in their order.

    Raises:
        ServiceError: its schema says more about them than can be enforced.
    """
    given = tool.parameters if isinstance(tool.parameters, dict) else {}
    path = f"tools[{index}].function.parameters"
    if more := sorted(given.keys() - _OF_OBJECTS):
        text = f"{path}.{more[0]} cannot be enforced in the model's form of calls"
        raise ServiceError(ErrorKind.TOOL, text, field=path)
    listed = given.get("properties", {})
    required = given.get("required", [])
    if not isinstance(listed, dict) or not isinstance(required, list):
        raise ServiceError(ErrorKind.TOOL, f"{path} is not the schema of an object", field=path)
    listed = {**listed, **{name: {} for name in required if name not in listed}}
    for name in listed:
        if not name or any(char in name for char in "<>\n"):
            text = f"{path}.properties must not have names with brackets or lines. Given: {name}"
            raise ServiceError(ErrorKind.TOOL, text, field=path)
    return [
        Parameter(name, schema, given, tool.name, is_required=name in required)
        for name, schema in listed.items()
    ]


def parameters_by_name(tools: Sequence[Tool]) -> dict[str, dict[str, Parameter]]:
    """The parameters of tools, by the names of both."""
    return {
        tool.name: {parameter.name: parameter for parameter in parameters_of(index, tool)}
        for index, tool in enumerate(tools)
    }


def _ended(value: Any, end: Any) -> Any:
    if isinstance(value, str) and isinstance(end, str):
        return value + end
    if isinstance(value, str) or "string" not in value:
        return [value, end]
    kind = value if value["string"] else "any"
    return {"until": end, "before": kind} if isinstance(end, str) else [{"text": kind}, end]


def _is_bare(schema: Any) -> bool:
    """Whether a schema says nothing but a type."""
    return not isinstance(schema, dict) or schema.keys() - _SAYS_NOTHING <= {"type"}


def _listed(schema: Any) -> list[Any] | None:
    """The values of a schema, if it lists them."""
    if not isinstance(schema, dict) or not schema.keys() & {"enum", "const"}:
        return None
    values = schema.get("enum", [schema.get("const")])
    return values if isinstance(values, list) else None


def _kind_of(text: str) -> str | None:
    """The type of a JSON value; None if it is a string, or none."""
    try:
        value = json.loads(text, parse_constant=lambda _: "")
    except (ValueError, RecursionError):
        return None
    kinds = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return "null" if value is None else kinds.get(type(value))
