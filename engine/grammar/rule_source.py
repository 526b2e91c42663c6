"""The source of a grammar that is put together from texts, tokens and JSON, as tool calls are.

A rule comes as plain data, since it travels to another process:

    "text"                             that text
    {"token": 128010}                  that token
    {"schema": {...}, "of": "name"}    JSON that fits the schema, which is that of a function
    {"source": "..."}                  what another grammar allows
    {"text": kind}                     any text, or little: "space" or "lines", two empty lines at
                                       most; or {"string": {...}, "of": "name"}, a string that
                                       fits the schema, not in quotation marks; it ends where a
                                       token follows
    {"until": "text", "before": kind}  such a text up to the first time that "text" stands there
    {"choice": [rule, ...]}            one of them
    {"optional": rule}, {"repeat": rule}
    [rule, ...]                        one after the other
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..protocol.errors import GrammarError
from .forms.text_writer import plain_expression

_KINDS = {"any": "/(?s:.*)/", "space": "/\\s*/", "lines": "/\\n{0,2}/"}


def rule_source(rule: Any, json_source: Callable[[dict[str, Any]], str]) -> str:
    """The source of a rule; `json_source` makes that of a schema.

    Raises:
        GrammarError: a schema cannot be enforced.
        ValueError: it is no rule.
    """
    writer = _Writer(json_source)
    start = writer.written(rule)
    lark = "\n".join([f"start: {start}", *writer.terminals, ""])
    return json.dumps({"grammars": [{"name": "rule", "lark_grammar": lark}, *writer.grammars]})


class _Writer:
    """Writes a rule in the library's language; terminals and schemas get names of their own."""

    def __init__(self, json_source: Callable[[dict[str, Any]], str]) -> None:
        self._json_source = json_source
        self.terminals: list[str] = []
        self.grammars: list[dict[str, Any]] = []

    def written(self, rule: Any) -> str:
        """A rule in the library's language."""
        if isinstance(rule, str):
            return json.dumps(rule, ensure_ascii=False)
        if isinstance(rule, list):
            return " ".join(map(self.written, rule))
        match rule:
            case {"token": token_id}:
                return f"<[{token_id}]>"
            case {"schema": schema}:
                return self._grammar(self._schema_source(schema, rule.get("of")))
            case {"source": source}:
                return self._grammar(source)
            case {"until": text, "before": kind}:
                return self._terminal(
                    "until", f"{self._texts(kind)} {self.written(text)}", "[lazy]"
                )
            case {"text": kind}:
                return self._terminal("text", self._texts(kind))
            case {"choice": rules}:
                return f"({' | '.join(map(self.written, rules))})"
            case {"optional": inner}:
                return f"({self.written(inner)})?"
            case {"repeat": inner}:
                return f"({self.written(inner)})*"
        raise ValueError(f"no rule: {rule}")

    def _texts(self, kind: Any) -> str:
        """The expression of texts of a kind."""
        if not isinstance(kind, dict):
            return _KINDS[kind]
        self._schema_source(kind["string"], kind.get("of"))  # finds what is wrong in it
        return f"({plain_expression(kind['string'])})"

    def _schema_source(self, schema: dict[str, Any], function: str | None) -> str:
        try:
            return self._json_source(schema)
        except GrammarError as error:
            if function is None:
                raise
            raise GrammarError(f"{error} of the parameters of {function}") from error

    def _terminal(self, kind: str, body: str, attribute: str = "") -> str:
        """A terminal, which is added once: the library tells two of the same kind apart badly."""
        for index, terminal in enumerate(self.terminals):
            if terminal.endswith(f"{attribute}: {body}"):
                return f"{kind}_{index}"
        name = f"{kind}_{len(self.terminals)}"
        self.terminals.append(f"{name}{attribute}: {body}")
        return name

    def _grammar(self, source: str) -> str:
        """A grammar beside this one."""
        name = f"grammar_{len(self.grammars)}"
        is_lark = not source.startswith("{")
        given = [{"lark_grammar": source}] if is_lark else json.loads(source)["grammars"]
        first, *others = given
        self.grammars += [{**first, "name": name}, *others]
        return f"@{name}"
