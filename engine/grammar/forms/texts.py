"""Strings of one form: a length, patterns that match and that do not, formats, listed texts."""

from __future__ import annotations

from dataclasses import dataclass

from . import expressions


@dataclass(frozen=True, slots=True)
class TextForm:
    """Strings that are all of this.

    Attributes:
        min_length, max_length: in characters; None without a limit.
        patterns, other_than: expressions that match somewhere, and that do not.
        formats: names of formats.
        values: all that there may be, if they are listed.
        excluded: texts that may not be.
    """

    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[str, ...] = ()
    other_than: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    values: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()

    def met(self, other: TextForm) -> TextForm | None:
        """What is of both forms; None if nothing is, as far as it shows."""
        values = self.values if other.values is None else other.values
        if self.values is not None and other.values is not None:
            values = tuple(value for value in self.values if value in other.values)
        longest = [n for n in (self.max_length, other.max_length) if n is not None]
        both = TextForm(
            max(self.min_length, other.min_length),
            min(longest, default=None),
            _joined(self.patterns, other.patterns),
            _joined(self.other_than, other.other_than),
            _joined(self.formats, other.formats),
            values,
            _joined(self.excluded, other.excluded),
        )
        return both if both._may_be else None

    @property
    def _may_be(self) -> bool:
        if self.max_length is not None and self.max_length < self.min_length:
            return False
        return self.values != () and not set(self.patterns) & set(self.other_than)

    def has(self, text: str) -> bool:
        """Whether a text is of this form, without its formats.

        Raises:
            GrammarError: a pattern cannot be matched.
        """
        if len(text) < self.min_length or text in self.excluded:
            return False
        if self.max_length is not None and len(text) > self.max_length:
            return False
        if self.values is not None and text not in self.values:
            return False
        return all(expressions.fits(pattern, text) for pattern in self.patterns) and not any(
            expressions.fits(pattern, text) for pattern in self.other_than
        )


def _joined(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*one, *other)))
