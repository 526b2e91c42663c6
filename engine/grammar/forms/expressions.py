"""Regular expressions of `pattern` in plain words, so that they can be matched, met and negated.

An expression is read once and written twice: for texts as they are, and for texts as JSON spells
them, between quotes. A character has one spelling only, so the texts that an expression does not
match are those whose spelling the second form does not match.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from .limits import unsayable

Ranges = tuple[tuple[int, int], ...]  # of characters, both ends included, in order

NOTHING = r"[^\u0000-\U0010FFFF]"  # no text matches

_LAST = 0x10FFFF
_SHORT = {0x22: '"', 0x5C: "\\", 8: "b", 12: "f", 10: "n", 13: "r", 9: "t"}
_LONG = [code for code in range(0x20) if code not in _SHORT]  # spelled by their numbers
_ALL_LONG = "u00(?:0[0-7bef]|1[0-9a-f])"
_DIGITS: Ranges = ((0x30, 0x39),)
_WORDS: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACES: Ranges = (
    *((0x9, 0xD), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
)
_CLASSES = {"d": _DIGITS, "w": _WORDS, "s": _SPACES}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})\??")
_GROUP = re.compile(r"\((?:\?:|\?P?<[A-Za-z_]\w*>)?(?!\?)")
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]+)\}")
_Spell = Callable[[Ranges], str]


def fits(pattern: str, text: str) -> bool:
    """Whether a pattern matches somewhere in a text."""
    return bool(_compiled(pattern).fullmatch(text))


def whole(pattern: str) -> str:
    """The expression of the texts in which a pattern matches somewhere.

    Raises:
        GrammarError: the pattern has look-arounds, backreferences or properties of characters.
    """
    return _Reader(pattern, _class_of).whole()


@lru_cache(256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(whole(pattern))


def quoted(pattern: str) -> str:
    """The expression of the JSON strings, with quotes, in which a pattern matches somewhere.

    Raises:
        GrammarError: the pattern has look-arounds, backreferences or properties of characters.
    """
    fits(pattern, "")  # finds what is wrong in it
    return f'"{_Reader(pattern, _spelled_class).whole()}"'


def quoted_text(text: str) -> str:
    """The expression of one JSON string, with quotes."""
    return f'"{"".join(_spelled_class(((ord(char), ord(char)),)) for char in text)}"'


def quoted_length(least: int, most: int | None) -> str:
    """The expression of the JSON strings, with quotes, of so many characters."""
    return f'"(?:{_spelled_class(_complement(()))}){{{least},{"" if most is None else most}}}"'


def spelled(text: str) -> str:
    """A text as JSON spells it, with quotes: one spelling for each character."""
    return f'"{"".join(_escape(ord(char)) or char for char in text)}"'


class _Reader:
    """Reads a pattern; `spell` writes the classes of characters in it."""

    def __init__(self, pattern: str, spell: _Spell) -> None:
        self._text = pattern
        self._at = 0
        self._spell = spell
        self._any = f"(?:{spell(_complement(()))})*"

    def whole(self) -> str:
        """The expression that matches all of a text in which the pattern matches somewhere."""
        forms = [self._anchored()]
        while self._takes("|"):
            forms.append(self._anchored())
        if self._at < len(self._text):
            raise self._cannot()
        return f"(?:{'|'.join(forms)})"

    def _anchored(self) -> str:
        """An alternative, which may begin and end where the text does."""
        before = "" if self._takes("^") else self._any
        while self._takes("^"):
            pass
        body = self._sequence()
        after = "" if self._takes("$") else self._any
        while self._takes("$"):
            pass
        return before + body + after

    def _sequence(self) -> str:
        parts = []
        while self._at < len(self._text) and self._text[self._at] not in "|)$":
            atom = self._atom()
            found = _QUANTIFIER.match(self._text, self._at)
            if found:
                self._at = found.end()
                atom = f"(?:{atom}){found[0][:-1] if found[0][1:].endswith('?') else found[0]}"
            parts.append(atom)
        return "".join(parts)

    def _atom(self) -> str:
        if self._text[self._at] == "(":
            return self._group()
        if self._text[self._at] == "[":
            return self._spell(self._set())
        char = self._text[self._at]
        self._at += 1
        if char == ".":
            return self._spell(_complement(((10, 10), (13, 13))))
        if char == "\\":
            return self._spell(self._escaped())
        if char in "^*+?{":
            raise self._cannot()
        return self._spell(((ord(char), ord(char)),))

    def _group(self) -> str:
        found = _GROUP.match(self._text, self._at)
        if not found:
            raise self._cannot()
        self._at = found.end()
        forms = [self._sequence()]
        while self._takes("|"):
            forms.append(self._sequence())
        if not self._takes(")"):
            raise self._cannot()
        return f"(?:{'|'.join(forms)})"

    def _set(self) -> Ranges:
        """A class like `[^a-z_]`."""
        self._at += 1
        is_negated = self._takes("^")
        ranges: list[tuple[int, int]] = []
        while not self._takes("]"):
            first = self._member()
            if not self._text.startswith("-", self._at) or self._text.startswith("-]", self._at):
                ranges += first
                continue
            self._at += 1
            last = self._member()
            if len(first) > 1 or len(last) > 1 or first[0][0] > last[0][1]:
                raise self._cannot()
            ranges.append((first[0][0], last[0][1]))
        return _complement(tuple(ranges)) if is_negated else _complement(_complement(tuple(ranges)))

    def _member(self) -> Ranges:
        if self._at >= len(self._text) or self._text[self._at] == "[":
            raise self._cannot()
        char = self._text[self._at]
        self._at += 1
        if char != "\\":
            return ((ord(char), ord(char)),)
        return ((8, 8),) if self._takes("b") else self._escaped()

    def _escaped(self) -> Ranges:
        if (found := _HEX.match(self._text, self._at)) is not None:
            self._at = found.end()
            code = int(found[1] or found[2] or found[3], 16)
            return ((code, code),)
        char = self._text[self._at : self._at + 1]
        self._at += 1
        if char.lower() in _CLASSES and char:
            ranges = _CLASSES[char.lower()]
            return ranges if char.islower() else _complement(ranges)
        if char in _CONTROLS and not self._text[self._at : self._at + 1].isdigit():
            return ((_CONTROLS[char], _CONTROLS[char]),)
        if not char or char.isalnum():
            raise self._cannot()
        return ((ord(char), ord(char)),)

    def _takes(self, char: str) -> bool:
        is_next = self._text.startswith(char, self._at)
        self._at += is_next
        return is_next

    def _cannot(self) -> Exception:
        return unsayable(f"the pattern {self._text[:200]}")


def _complement(ranges: Ranges) -> Ranges:
    """All other characters, in order and without overlaps."""
    others, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            others.append((start, low - 1))
        start = max(start, high + 1)
    return (*others, (start, _LAST)) if start <= _LAST else tuple(others)


def _class_of(ranges: Ranges) -> str:
    """A class of characters, in words that all regular expressions share."""
    if not ranges:
        return NOTHING
    parts = [_code(low) + (f"-{_code(high)}" if high > low else "") for low, high in ranges]
    return f"[{''.join(parts)}]"


def _spelled_class(ranges: Ranges) -> str:
    """The same for characters as JSON spells them."""
    plain = _complement(((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), *_complement(ranges)))
    short = [re.escape(_SHORT[code]) for code in _SHORT if _has(ranges, code)]
    long = [code for code in _LONG if _has(ranges, code)]
    numbers = [_ALL_LONG] if len(long) == len(_LONG) else [f"u{code:04x}" for code in long]
    forms = [_class_of(plain)] if plain else []
    if short or long:
        forms.append(rf"\\(?:{'|'.join([*short, *numbers])})")
    return f"(?:{'|'.join(forms)})" if forms else NOTHING


def _has(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _escape(code: int) -> str:
    """How JSON spells a character that cannot stand for itself; empty for others."""
    if code in _SHORT:
        return f"\\{_SHORT[code]}"
    return f"\\u{code:04x}" if code < 0x20 else ""


def _code(code: int) -> str:
    char = chr(code)
    if char.isascii() and char.isalnum():
        return char
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"
