"""The rules of a grammar, of which those that lead to no text go before it is written."""

from __future__ import annotations

import json
from typing import Any

from ...protocol.errors import GrammarError
from .emptiness import is_empty
from .limits import MAX_RULES, too_many

Symbols = tuple[str, ...]  # one after the other, each the name of a rule or a literal in quotes


class Productions:
    """Rules by name, each with its alternatives, and terminals.

    Args:
        json_options: the library's options for JSON.
    """

    def __init__(self, json_options: dict[str, Any]) -> None:
        self._options = json_options
        self._rules: dict[str, list[Symbols]] = {}
        self._repeats: dict[str, tuple[str, int, int | None]] = {}
        self._bodies: dict[str, str] = {}  # of terminals and JSON, by name
        self._names: dict[str, str | None] = {}  # of the same by body; None if it allows nothing
        self._num_names = 0

    def new_name(self, first: str) -> str:
        """A name that no rule has."""
        self._num_names += 1
        if self._num_names > MAX_RULES:
            raise too_many("rules", MAX_RULES)
        return f"{first}{self._num_names}"

    def add(self, name: str, *alternatives: Symbols) -> None:
        """Adds alternatives to a rule."""
        self._rules.setdefault(name, []).extend(alternatives)

    def repeated(self, symbol: str, least: int, most: int | None) -> str:
        """A rule for a symbol several times, with commas between."""
        name = self.new_name("n")
        self._repeats[name] = (symbol, least, most)
        return name

    def json(self, schema: dict[str, Any]) -> str | None:
        """A symbol for what fits a schema that the library knows; None if nothing does."""
        text = json.dumps({**schema, "x-guidance": self._options})
        return self._body(f"%json {text}", "j")

    def terminal(self, expression: str) -> str | None:
        """A symbol for an expression in Lark; None if it matches nothing."""
        return self._body(expression, "T")

    def lark(self, start: str) -> str:
        """The rules that are needed, in Lark.

        Raises:
            GrammarError: there is no text.
        """
        productive = self._productive()
        if start not in productive:
            raise GrammarError("unsatisfiable: nothing fits it")
        lines, names = [], [start]
        for name in names:  # grows
            rule = self._bodies.get(name) or self._written(name, productive, names)
            lines.append(f"{name}: {rule}")
        return "\n".join(lines) + "\n"

    def _body(self, body: str, first: str) -> str | None:
        if body not in self._names:
            if is_empty(f"t\nt: {body}" if first == "j" else f"T\nT: {body}"):
                self._names[body] = None
            else:
                name = self._names[body] = self.new_name(first)
                self._bodies[name] = body
        return self._names[body]

    def _productive(self) -> set[str]:
        """The names that lead to a text."""
        users: dict[str, list[str]] = {}
        for name, alternatives in self._rules.items():
            for symbol in {symbol for symbols in alternatives for symbol in symbols}:
                users.setdefault(symbol, []).append(name)
        for name, (symbol, _, _) in self._repeats.items():
            users.setdefault(symbol, []).append(name)
        productive = set(self._bodies)
        waiting = [*self._bodies, *self._rules, *self._repeats]
        while waiting:
            name = waiting.pop()
            if name in productive and name not in self._bodies:
                continue
            if name in self._bodies or self._leads_to_text(name, productive):
                productive.add(name)
                waiting += users.get(name, [])
        return productive

    def _leads_to_text(self, name: str, productive: set[str]) -> bool:
        if name in self._repeats:
            return self._repeats[name][0] in productive
        return any(_is_productive(some, productive) for some in self._rules.get(name, ()))

    def _written(self, name: str, productive: set[str], names: list[str]) -> str:
        if name in self._repeats:
            symbol, least, most = self._repeats[name]
            _note(names, symbol)
            times = f"{{{least - 1},{'' if most is None else most - 1}}}"
            return symbol if most == 1 else f'{symbol} (", " {symbol}){times}'
        alternatives = dict.fromkeys(self._rules[name])
        kept = [some for some in alternatives if _is_productive(some, productive)]
        for symbols in kept:
            for symbol in symbols:
                _note(names, symbol)
        return " | ".join(" ".join(symbols) for symbols in kept)


def _is_productive(symbols: Symbols, productive: set[str]) -> bool:
    return all(symbol.startswith('"') or symbol in productive for symbol in symbols)


def _note(names: list[str], symbol: str) -> None:
    if not symbol.startswith('"') and symbol not in names:
        names.append(symbol)
