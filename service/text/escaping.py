"""Special tokens that callers spell in a conversation, and that shall be plain text to the model.

    values --hide--> values with a mark in each spelling --template--> prompt with marks
    prompt with marks --reveal--> EscapedText --encode--> tokens

A tokenizer takes every spelling of a special token for the token. So a copy of it makes the tokens,
which knows its special tokens by names that nobody can guess, and only what the template wrote gets
those names.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

from tokenizers import Encoding, Tokenizer

from engine.protocol.token_names import rename_tokens


class EscapedText(str):
    """A text in which a special token is meant only at some places.

    Attributes:
        special: where: first character, and the one behind the last.
    """

    __slots__ = ("special",)

    special: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, special: Iterable[tuple[int, int]]) -> EscapedText:
        """A text, and the places of its special tokens from left to right."""
        made = super().__new__(cls, text)
        made.special = tuple(special)
        return made


class SpecialTokens:
    """The special tokens of a tokenizer, as texts spell them.

    Those are the ones that it calls special, and the others in brackets: the marks of turns, of
    thoughts or of calls are of both kinds.

    Args:
        backend: the tokenizer.
    """

    def __init__(self, backend: Tokenizer) -> None:
        added = backend.get_added_tokens_decoder().values()
        spellings = [token.content for token in added if token.special or _is_mark(token.content)]
        longest_first = sorted(filter(None, spellings), key=len, reverse=True)
        # An empty choice would match everywhere; this one matches nowhere.
        self._spelling = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        nonce = secrets.token_hex(8)
        self._names = {
            text: f"\ufdd0{nonce}{index}\ufdd1" for index, text in enumerate(longest_first)
        }
        self._backend = _renamed(backend, self._names)

    def hide(self, value: Any, mark: str, but: frozenset[str] = frozenset()) -> Any:
        """A copy of a JSON value with a mark inside of each spelling of a special token.

        `but` are tokens that stay as they are.
        """
        if isinstance(value, str):
            return self._spelling.sub(lambda found: _marked(found[0], mark, but), value)
        if isinstance(value, list):
            return [self.hide(item, mark, but) for item in value]
        if isinstance(value, dict):
            return {
                self.hide(key, mark, but): self.hide(item, mark, but) for key, item in value.items()
            }
        return value

    def reveal(self, text: str, mark: str) -> str:
        """A text without its marks; an EscapedText if it has any."""
        if mark not in text:
            return text
        special = []
        num_removed = 0
        for found in re.finditer(f"{self._spelling.pattern}|{mark}", text):
            start = found.start() - num_removed
            if found[0] == mark:
                num_removed += len(mark)
            else:
                special.append((start, start + len(found[0])))
        return EscapedText(text.replace(mark, ""), special)

    def places(self, text: str) -> tuple[tuple[int, int], ...]:
        """Where a text spells special tokens."""
        return tuple(found.span() for found in self._spelling.finditer(text))

    def encode(self, text: EscapedText) -> tuple[Encoding, list[int]]:
        """The tokens, and for each character that their offsets count the one of the text."""
        parts, origins, at = [], list[int](), 0
        for start, stop in text.special:
            name = self._names[text[start:stop]]
            parts += [text[at:start], name]
            origins += [*range(at, start), *[start] * len(name)]
            at = stop
        parts.append(text[at:])
        origins += range(at, len(text) + 1)
        return self._backend.encode_batch(["".join(parts)])[0], origins


def _is_mark(text: str) -> bool:
    return text[:1] + text[-1:] in ("<>", "[]")


def _marked(spelling: str, mark: str, but: frozenset[str]) -> str:
    return spelling if spelling in but else f"{spelling[0]}{mark}{spelling[1:]}"


def new_mark() -> str:
    """A text that no other text contains."""
    return secrets.token_hex(16)


def _renamed(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy of a tokenizer that knows tokens by other names."""
    spec = json.loads(backend.to_str())
    rename_tokens(spec, names)
    return Tokenizer.from_str(json.dumps(spec))
