"""Objects of one form: what the properties of which names are, and which there must be."""

from __future__ import annotations

from dataclasses import dataclass

from .demands import ANYTHING, Demands


@dataclass(frozen=True, slots=True)
class Names:
    """The names that are listed or that a pattern matches; with `are_others` all but those."""

    listed: frozenset[str] = frozenset()
    patterns: frozenset[str] = frozenset()
    are_others: bool = False

    def has(self, name: str, matching: frozenset[str]) -> bool:
        """Whether a name is among them, which these patterns match."""
        return (name in self.listed or bool(self.patterns & matching)) != self.are_others

    def has_unlisted(self, matching: frozenset[str]) -> bool:
        """Whether the names that nothing lists are among them, which these patterns match."""
        return bool(self.patterns & matching) != self.are_others


@dataclass(frozen=True, slots=True)
class Witness:
    """That a property of such a name is there, whose name and value fit demands."""

    names: Names
    name: Demands
    value: Demands


@dataclass(frozen=True, slots=True)
class ObjectForm:
    """Objects that are all of this.

    Attributes:
        rules: demands on the values of all properties of some names.
        required: names that must be there.
        most: of properties; None without a limit.
        names: demands on all names.
        witnesses: properties of which one must be there.
        seen: names whose properties are evaluated; `are_all_seen` says that all are.
    """

    rules: tuple[tuple[Names, Demands], ...] = ()
    required: tuple[str, ...] = ()
    least: int = 0
    most: int | None = None
    names: Demands = ANYTHING
    witnesses: tuple[Witness, ...] = ()
    seen: Names = Names()
    are_all_seen: bool = False

    def met(self, other: ObjectForm) -> ObjectForm | None:
        """What is of both forms; None if nothing is, as far as it shows."""
        ends = [most for most in (self.most, other.most) if most is not None]
        both = ObjectForm(
            tuple(dict.fromkeys((*self.rules, *other.rules))),
            tuple(dict.fromkeys((*self.required, *other.required))),
            max(self.least, other.least),
            min(ends, default=None),
            self.names | other.names,
            tuple(dict.fromkeys((*self.witnesses, *other.witnesses))),
            Names(self.seen.listed | other.seen.listed, self.seen.patterns | other.seen.patterns),
            self.are_all_seen or other.are_all_seen,
        )
        return None if both._is_empty else both

    @property
    def _is_empty(self) -> bool:
        if self.most is not None and self.most < max(self.least, len(self.required)):
            return True
        absent = {
            name
            for names, demands in self.rules
            if ("false", True) in demands and not names.are_others
            for name in names.listed
        }
        return not absent.isdisjoint(self.required)
