"""Forms as rules of a grammar."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

from ...protocol.errors import GrammarError
from ..schema.integers import integer_regex
from ..schema.numbers import FREE_NUMBER, LARGEST, integer_bounds, with_exact_numbers
from . import expressions
from .array_writer import array_sequence
from .arrays import ArrayForm
from .claims import KINDS, ValuesForm
from .demands import Demands
from .expansion import Expansion
from .limits import unsayable
from .numbers import Number, NumberForm
from .object_writer import object_sequences
from .objects import ObjectForm
from .productions import Productions
from .text_writer import text_expression
from .texts import TextForm

_FRACTION = r"\.[0-9]{0,9}[1-9]"  # that is not zero


class Writer:
    """Writes a rule for each combination of demands that a value may have to meet."""

    def __init__(self, expansion: Expansion, productions: Productions) -> None:
        self.expansion = expansion
        self.productions = productions
        self._names: dict[Demands, str] = {}
        self._unwritten: list[Demands] = []

    def lark(self, demands: Demands) -> tuple[str, str]:
        """The rules of the values that meet demands, behind the name of the first of them.

        Raises:
            GrammarError: they cannot be said, need too much, or nothing meets them.
        """
        start = self.symbol(demands)
        while self._unwritten:
            self._write(self._unwritten.pop())
        return start, self.productions.lark(start)

    def symbol(self, demands: Demands) -> str:
        """The rule of the values that meet demands."""
        if demands not in self._names:
            self._names[demands] = self.productions.new_name("v")
            self._unwritten.append(demands)
        return self._names[demands]

    def _write(self, demands: Demands) -> None:
        name = self._names[demands]
        self.productions.add(name)
        if ("false", True) in demands:
            return
        for kind in KINDS:
            for form in self.expansion.forms(demands, kind):
                self._write_form(name, form)

    def _write_form(self, name: str, form: Any) -> None:
        if isinstance(form, ArrayForm):
            array_sequence(form, self).write(self.productions, name, "[]")
        elif isinstance(form, ObjectForm):
            for sequence in object_sequences(form, self):
                sequence.write(self.productions, name, "{}")
        elif isinstance(form, ValuesForm):
            self._add_texts(name, [json.dumps(value) for value in form.values])
        elif isinstance(form, NumberForm):
            self._write_number(name, form)
        else:
            self._write_text(name, form)

    def _add_texts(self, name: str, texts: list[str]) -> None:
        for text in texts:
            self.productions.add(name, (json.dumps(text, ensure_ascii=False),))

    def _write_number(self, name: str, form: NumberForm) -> None:
        if form.values is not None:
            self._add_texts(name, [numeral(value) for value in sorted(form.values)])
            return
        if form == NumberForm():
            symbol = self.productions.terminal(f"/{FREE_NUMBER}/")
        elif form.is_integer is False:
            symbol = self.productions.terminal(f"/{_no_integers(form)}/")
        else:
            schema = form.schema()
            low, high = integer_bounds(schema) if form.is_integer else (None, None)
            if low is not None and high is not None and low > high:
                return
            exact = with_exact_numbers(schema, "a part of it", fill=True)
            symbol = self.productions.json(exact)
        if symbol is not None:
            self.productions.add(name, (symbol,))

    def _write_text(self, name: str, form: TextForm) -> None:
        if form.values is not None and not form.formats:
            kept = [text for text in form.values if form.has(text)]
            self._add_texts(name, [expressions.spelled(text) for text in kept])
            return
        symbol = self.productions.json(schema) if (schema := _plain(form)) else None
        if schema is None:
            symbol = self.productions.terminal(text_expression(form))
        if symbol is not None:
            self.productions.add(name, (symbol,))


def numeral(value: Number) -> str:
    """A number as JSON has it."""
    return str(int(value)) if value == int(value) else json.dumps(value)


def _plain(form: TextForm) -> dict[str, Any] | None:
    """The keywords that say what texts are of a form, if the library has them."""
    if form.formats:
        if len(form.formats) > 1 or form.other_than or form.excluded or form.values is not None:
            raise unsayable('a "format" beside other words on the same string')
    elif len(form.patterns) > 1 or form.other_than or form.excluded:
        return None
    said: dict[str, Any] = {"type": "string"}
    if form.min_length:
        said["minLength"] = form.min_length
    if form.max_length is not None:
        said["maxLength"] = form.max_length
    if form.formats:
        said["format"] = form.formats[0]
    if form.patterns:
        said["pattern"] = form.patterns[0]
    if len(form.patterns) > 1:
        said["allOf"] = [{"pattern": pattern} for pattern in form.patterns[1:]]
    return said


def _no_integers(form: NumberForm) -> str:
    """The expression of the numbers in an interval that are no integers."""
    if form.factor is not None:
        raise unsayable('"multipleOf" beside numbers that are no integers')
    bounds = (form.low, form.high)
    if any(bound is not None and Fraction(bound).denominator != 1 for bound in bounds):
        raise unsayable("a bound that is no integer of numbers that are none either")
    low = -LARGEST if form.low is None else max(int(form.low), -LARGEST)
    high = LARGEST if form.high is None else min(int(form.high), LARGEST)
    parts = []
    if low < 0:
        whole = integer_regex(max(0, -high), -low - 1)
        parts.append(f"-(?:{whole}){_FRACTION}")
    if high > 0:
        parts.append(f"(?:{integer_regex(max(0, low), high - 1)}){_FRACTION}")
    if not parts or low >= high:
        raise GrammarError("a number between bounds is no integer")
    return "|".join(parts)
