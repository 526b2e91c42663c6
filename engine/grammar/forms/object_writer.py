"""Objects of a form as automata: first the properties with known names, then all others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import expressions
from .demands import ANYTHING, Demands
from .limits import MAX_FORMS, too_many, unsayable
from .objects import ObjectForm, Witness
from .productions import Symbols
from .sequences import Sequence
from .text_writer import text_expression
from .texts import TextForm

if TYPE_CHECKING:
    from .writer import Writer

_MAX_PATTERNS = 6  # of the names of one object: each combination of them has names of its own


@dataclass(frozen=True, slots=True)
class _Others:
    """Names that nothing lists, which some patterns match and no others.

    Attributes:
        matching: the patterns.
        key: the symbol of such a name.
        value: demands on the values.
    """

    matching: frozenset[str]
    key: str
    value: Demands


def object_sequences(form: ObjectForm, writer: Writer) -> Iterator[Sequence]:
    """Automata of the objects of a form, one for each way to have what must be there.

    Raises:
        GrammarError: there are too many, or names would have to be counted.
    """
    layout = _Layout(form, writer)
    choices = [layout.places(witness) for witness in form.witnesses]
    total = 1
    for some in choices:
        total *= len(some)
    if total > MAX_FORMS:
        raise too_many("ways to have the properties that there must be", MAX_FORMS)
    for places in itertools.product(*choices):
        yield from layout.sequences(places)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a property is that must be there: at a known name, or behind all others."""

    name: str | None
    key: str
    value: Demands


class _Layout:
    """The names of an object: those that are known, and the groups of all others."""

    def __init__(self, form: ObjectForm, writer: Writer) -> None:
        self._form = form
        self._writer = writer
        spoken_of = [names for names, _ in form.rules]
        spoken_of += [witness.names for witness in form.witnesses]
        self._patterns = sorted({p for names in spoken_of for p in names.patterns})
        listed = [name for names in spoken_of for name in sorted(names.listed)]
        self._names = list(dict.fromkeys([*listed, *form.required]))
        if len(self._patterns) > _MAX_PATTERNS:
            raise too_many("patterns for the names of one object", _MAX_PATTERNS)
        self._matching = {name: self._patterns_of(name) for name in self._names}
        self._others = list(self._groups(form.names))

    def places(self, witness: Witness) -> list[_Place]:
        """Where the property of a witness may be."""
        known = [
            _Place(name, "", witness.value)
            for name in self._names
            if witness.names.has(name, self._matching[name]) and self._fits(name, witness.name)
        ]
        others = self._groups(self._form.names | witness.name)
        return known + [
            _Place(None, group.key, group.value | witness.value)
            for group in others
            if witness.names.has_unlisted(group.matching)
        ]

    def sequences(self, places: tuple[_Place, ...]) -> Iterator[Sequence]:
        """The automaton of the objects that have their witnesses in these places."""
        last = [place for place in places if place.name is None]
        if len(last) > 1:
            raise unsayable("two properties that must be there, of names that are not listed")
        demands = {name: self._value_of(name) for name in self._names}
        required = set(self._form.required)
        for place in places:
            if place.name is not None:
                required.add(place.name)
                demands[place.name] |= place.value
        absent = {n for n in self._names if ("false", True) in demands[n] or not self._may_be(n)}
        if absent.isdisjoint(required):
            present = {name: demands[name] for name in self._names if name not in absent}
            yield self._sequence(present, required, last)

    def _sequence(
        self, demands: dict[str, Demands], required: set[str], last: list[_Place]
    ) -> Sequence:
        least, most = self._bounds(len(demands), len(required), is_open=bool(self._others or last))
        cap = max(least, most or 0)
        members = {
            name: (json.dumps(expressions.spelled(name), ensure_ascii=False), value)
            for name, value in demands.items()
        }
        sequence = Sequence((0, 0))
        for index, (name, (key, value)) in enumerate(members.items()):
            member = self._member(key, value)
            for count in range(min(index, cap) + 1):
                if name not in required:
                    sequence.skips.append(((index, count), (index + 1, count)))
                if count != most:
                    after = (index + 1, min(count + 1, cap))
                    sequence.edges.append(((index, count), member, after))
        others = [self._member(group.key, group.value) for group in self._others]
        self._add_others(sequence, len(members), others, (least, most))
        for place in last:
            member = self._member(place.key, place.value)
            for count in range(cap + 1):
                if count != most:
                    over = ("end", min(count + 1, cap))
                    sequence.edges.append(((len(members), count), member, over))
        end = "end" if last else len(members)
        sequence.ends += [(end, count) for count in range(least, cap + 1)]
        return sequence

    def _add_others(
        self,
        sequence: Sequence,
        index: int,
        members: list[Symbols],
        bounds: tuple[int, int | None],
    ) -> None:
        """Adds properties of names that nothing lists, of which any may come again."""
        least, most = bounds
        cap = max(least, most or 0)
        for member in members:
            for count in range(cap + 1):
                if count != most:
                    target = (index, min(count + 1, cap))
                    sequence.edges.append(((index, count), member, target))

    def _bounds(self, known: int, required: int, *, is_open: bool) -> tuple[int, int | None]:
        """How many properties must be counted.

        Raises:
            GrammarError: several of names that nothing lists: the same name could come twice.
        """
        least, most = self._form.least, self._form.most
        if most is not None and not is_open and known <= most:
            most = None
        if is_open and least > required + 1:
            raise unsayable('"minProperties" above the number of names that are required')
        return (0 if least <= required else least), most

    def _member(self, key: str, value: Demands) -> Symbols:
        return (key, '": "', self._writer.symbol(value))

    def _value_of(self, name: str) -> Demands:
        demands = ANYTHING
        for names, value in self._form.rules:
            if names.has(name, self._matching[name]):
                demands |= value
        return demands

    def _may_be(self, name: str) -> bool:
        return self._fits(name, self._form.names)

    def _fits(self, name: str, demands: Demands) -> bool:
        if ("false", True) in demands:
            return False
        forms = self._writer.expansion.forms(demands, "string")
        if any(form.formats for form in forms):
            raise unsayable('"format" of a name')
        return any(form.has(name) for form in forms)

    def _patterns_of(self, name: str) -> frozenset[str]:
        return frozenset(p for p in self._patterns if expressions.fits(p, name))

    def _groups(self, name_demands: Demands) -> Iterator[_Others]:
        """The names that nothing lists, in groups that the same rules hold for."""
        forms = self._writer.expansion.forms(name_demands, "string")
        for number in range(2 ** len(self._patterns)):
            chosen = [p for at, p in enumerate(self._patterns) if number >> at & 1]
            matching = frozenset(chosen)
            value = self._value_of_others(matching)
            if ("false", True) in value:
                continue
            group = TextForm(
                patterns=tuple(chosen),
                other_than=tuple(p for p in self._patterns if p not in matching),
                excluded=tuple(self._names),
            )
            for form in forms:
                key = self._key(form.met(group))
                if key is not None:
                    yield _Others(matching, key, value)

    def _key(self, form: TextForm | None) -> str | None:
        return None if form is None else self._writer.productions.terminal(text_expression(form))

    def _value_of_others(self, matching: frozenset[str]) -> Demands:
        demands = ANYTHING
        for names, value in self._form.rules:
            if names.has_unlisted(matching):
                demands |= value
        return demands
