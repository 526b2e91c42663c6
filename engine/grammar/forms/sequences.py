"""Arrays and objects as automata over their members, and those as rules."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .limits import MAX_STATES, too_many
from .productions import Productions, Symbols


@dataclass(slots=True)
class Sequence:
    """An automaton: what has been written leads from the start to a state.

    Attributes:
        edges: a member leads from a state to another.
        skips: a state counts as another too.
        ends: states in which the sequence may end.
    """

    start: Hashable
    edges: list[tuple[Hashable, Symbols, Hashable]] = field(default_factory=list)
    skips: list[tuple[Hashable, Hashable]] = field(default_factory=list)
    ends: list[Hashable] = field(default_factory=list)

    def write(self, productions: Productions, name: str, brackets: str) -> None:
        """Adds the texts of the sequence, between brackets, to a rule.

        Literals are as short as in the library's own JSON: its lexer takes the longest that may
        follow, and would miss the others.
        """
        states = dict.fromkeys([self.start, *(state for a, _, b in self.edges for state in (a, b))])
        states |= dict.fromkeys(state for skip in self.skips for state in skip)
        if len(states) > MAX_STATES:
            raise too_many("states of one array or object", MAX_STATES)
        names = {state: productions.new_name("s") for state in states}
        unwritten = self._before_any()
        for source, member, target in self.edges:
            if source in unwritten:
                productions.add(names[target], member)
            productions.add(names[target], (names[source], '", "', *member))
        for source, target in self.skips:
            productions.add(names[target], (names[source],))
        opening, closing = (f'"{bracket}"' for bracket in brackets)
        for state in self.ends:
            if state in unwritten:
                productions.add(name, (opening, closing))
            if state in names:
                productions.add(name, (opening, names[state], closing))

    def _before_any(self) -> set[Hashable]:
        """The states that there are without any member."""
        found = {self.start}
        waiting = [self.start]
        follows: dict[Hashable, list[Hashable]] = {}
        for source, target in self.skips:
            follows.setdefault(source, []).append(target)
        while waiting:
            new = [state for state in follows.get(waiting.pop(), ()) if state not in found]
            found.update(new)
            waiting += new
        return found
