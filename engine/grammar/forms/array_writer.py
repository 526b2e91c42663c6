"""Arrays of a form as automata: how far they are, what was counted, which items there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .arrays import ArrayForm, Count
from .claims import KINDS
from .demands import ANYTHING, Demands
from .limits import MAX_STATES, too_many, unsayable
from .sequences import Sequence

if TYPE_CHECKING:
    from .writer import Writer

_MAX_VALUES = 64  # of an item of which there may be no two


@dataclass(frozen=True, slots=True)
class _State:
    """What is known of an array so far.

    Attributes:
        index: number of items, up to where it no longer matters.
        counts: of each `Count`, up to the same.
        used: the values that there are, if there may be no two of them.
    """

    index: int
    counts: tuple[int, ...]
    used: frozenset[str] = frozenset()


def array_sequence(form: ArrayForm, writer: Writer) -> Sequence:
    """The automaton of the arrays of a form.

    Raises:
        GrammarError: it has too many states, or items may be equal.
    """
    if not form.counts and not form.is_unique:
        return _plain_sequence(form, writer)
    walk = _Walk(form, writer)
    sequence = Sequence(walk.start)
    waiting, known = [walk.start], {walk.start}
    while waiting:
        state = waiting.pop()
        if walk.may_end(state):
            sequence.ends.append(state)
        for demands, target in walk.steps(state):
            sequence.edges.append((state, (writer.symbol(demands),), target))
            if target not in known:
                known.add(target)
                waiting.append(target)
        if len(known) > MAX_STATES:
            raise too_many("states of one array", MAX_STATES)
    return sequence


def _plain_sequence(form: ArrayForm, writer: Writer) -> Sequence:
    """The automaton where only the number of items matters."""
    sequence = Sequence(0)
    length = len(form.prefix) if form.most is None else min(len(form.prefix), form.most)
    for index in range(length):
        sequence.edges.append((index, (writer.symbol(form.prefix[index]),), index + 1))
    sequence.ends += range(form.least, length + 1)
    more = None if form.most is None else form.most - length
    if more != 0:
        least = max(1, form.least - length)
        rest = writer.productions.repeated(writer.symbol(form.rest), least, more)
        sequence.edges.append((length, (rest,), "rest"))
        sequence.ends.append("rest")
    return sequence


class _Walk:
    """The states of arrays of a form, and the items that lead from one to another."""

    def __init__(self, form: ArrayForm, writer: Writer) -> None:
        self._form = form
        self._writer = writer
        firsts = [count.first for count in form.counts]
        length = max(len(form.prefix), form.least, *firsts, form.most or 0, 0)
        if length > MAX_STATES:
            raise too_many("states of one array", MAX_STATES)
        self._length = length
        self._values: dict[Demands, list[Any]] = {}
        self.start = _State(0, (0,) * len(form.counts))

    def may_end(self, state: _State) -> bool:
        """Whether an array may end in a state."""
        enough = all(n >= c.least for n, c in zip(state.counts, self._form.counts, strict=True))
        return enough and state.index >= self._form.least

    def steps(self, state: _State) -> Iterator[tuple[Demands, _State]]:
        """The demands on the next item, each with the state that it leads to."""
        if state.index == self._form.most:
            return
        index = min(state.index + 1, self._length)
        for demands, counts in self._counted(state):
            demands = demands | self._form.at(state.index)
            if not self._form.is_unique:
                yield demands, _State(index, counts)
                continue
            for text, value in self._choices(self._form.at(state.index)):
                if text not in state.used:
                    yield demands | value, _State(index, counts, state.used | {text})

    def _counted(self, state: _State) -> Iterator[tuple[Demands, tuple[int, ...]]]:
        """What the next item may count as."""
        options: list[tuple[Demands, tuple[int, ...]]] = [(ANYTHING, ())]
        for number, count in zip(state.counts, self._form.counts, strict=True):
            options = [
                (demands | more, (*numbers, then))
                for demands, numbers in options
                for more, then in _options(count, number, is_early=state.index < count.first)
            ]
        yield from options

    def _choices(self, demands: Demands) -> Iterator[tuple[str, Demands]]:
        """The values that an item may have, each with the demand to be it."""
        if self._form.most == 1:
            yield "", ANYTHING
            return
        if demands not in self._values:
            self._values[demands] = _values(demands, self._writer)
        for value in self._values[demands]:
            yield repr(value), self._writer.expansion.schemas.demand({"const": value})


def _options(count: Count, number: int, *, is_early: bool) -> list[tuple[Demands, int]]:
    """What an item demands that counts or does not, and how many there are then."""
    if is_early:
        return [(ANYTHING, number)]
    if count.most is None:  # an item that is not counted may fit too
        more = [(count.fits, number + 1)] if number < count.least else []
        return [(ANYTHING, number), *more]
    more = [(count.fits, number + 1)] if number < count.most else []
    return [(count.fails, number), *more]


def _values(demands: Demands, writer: Writer) -> list[Any]:
    """All values that meet demands, and perhaps a few that do not.

    Raises:
        GrammarError: they are too many, or cannot be listed.
    """
    values: list[Any] = []
    if ("false", True) in demands:
        return []
    for kind in KINDS:
        for form in writer.expansion.forms(demands, kind):
            some = _listed(form)
            if some is None:
                raise unsayable('"uniqueItems" of items whose values are not listed')
            values += [value for value in some if repr(value) not in map(repr, values)]
            if len(values) > _MAX_VALUES:
                raise too_many('values of an item of "uniqueItems"', _MAX_VALUES)
    return values


def _listed(form: Any) -> list[Any] | None:
    """The values of a form, if they are listed."""
    given = getattr(form, "values", None)
    if given is None:
        return None
    return [int(v) if isinstance(v, float) and v == int(v) else v for v in given]
