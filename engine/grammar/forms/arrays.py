"""Arrays of one form: what their items are, and how many of them are what else."""

from __future__ import annotations

from dataclasses import dataclass

from .demands import ANYTHING, Demands


@dataclass(frozen=True, slots=True)
class Count:
    """How many items, from one of them on, fit demands.

    Attributes:
        first: index of the first item that counts.
        fits, fails: the demands, and the opposite ones.
        most: None without a limit.
    """

    first: int
    fits: Demands
    fails: Demands
    least: int
    most: int | None = None


@dataclass(frozen=True, slots=True)
class ArrayForm:
    """Arrays that are all of this.

    Attributes:
        prefix: demands on the first items; further ones have those of `rest`.
        most: of items; None without a limit.
        num_seen: how many of the first items are evaluated, or that all are.
        seen: demands whose items are evaluated.
    """

    prefix: tuple[Demands, ...] = ()
    rest: Demands = ANYTHING
    least: int = 0
    most: int | None = None
    counts: tuple[Count, ...] = ()
    is_unique: bool = False
    num_seen: int = 0
    are_all_seen: bool = False
    seen: tuple[Demands, ...] = ()

    def at(self, index: int) -> Demands:
        """The demands on an item."""
        return self.prefix[index] if index < len(self.prefix) else self.rest

    def met(self, other: ArrayForm) -> ArrayForm | None:
        """What is of both forms; None if nothing is, as far as it shows."""
        length = max(len(self.prefix), len(other.prefix))
        ends = [most for most in (self.most, other.most) if most is not None]
        both = ArrayForm(
            tuple(self.at(index) | other.at(index) for index in range(length)),
            self.rest | other.rest,
            max(self.least, other.least),
            min(ends, default=None),
            tuple(dict.fromkeys((*self.counts, *other.counts))),
            self.is_unique or other.is_unique,
            max(self.num_seen, other.num_seen),
            self.are_all_seen or other.are_all_seen,
            (*self.seen, *other.seen),
        )
        return None if both.most is not None and both.most < both.least else both
