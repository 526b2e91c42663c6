"""Turns tokens into text, one token at a time, and never returns a part of a character.

A token's text depends on those before it (a leading space, bytes of one character spread over
tokens), so each new token is decoded together with a few earlier ones and only the difference
is returned. The window moves on whenever the text grew by whole characters: TGI's method
(server/text_generation_server/models/model.py at v2.1.1, decode_token), with a bound on its length.
With most tokenizers a token's text is always the same after whole characters, and is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT_TOKENS = 5  # of the prompt, in front of the first generated token
_MAX_PENDING_TOKENS = 16  # no character has more: it cannot become valid later
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[Sequence[int]], str]
TextOf = Callable[[int], str]


class Detokenizer:
    """The text of one growing sequence.

    Args:
        decode: the tokenizer's decoding of a list of ids.
        prompt_token_ids: the tokens before the generated ones.
        text_after: what a token adds to any text of whole characters; None if that depends on it.
    """

    def __init__(
        self, decode: Decode, prompt_token_ids: Sequence[int], text_after: TextOf | None = None
    ) -> None:
        self._decode = decode
        self._text_after = text_after
        self._window = list(prompt_token_ids[-_CONTEXT_TOKENS:])  # ids whose text was returned …
        self._num_read = len(self._window)  # … followed by ids that need more bytes
        self._prefix = decode(self._window) if self._window else ""
        self._num_returned = 0  # characters of the pending ids' text that were returned already
        # Whether a token's text can be looked up. The window's text is then known by its end alone.
        self._is_whole = _is_whole(self._prefix) and text_after is not None
        self._is_stale = False  # whether `_prefix` is that of an earlier window

    def push(self, token_id: int) -> str:
        """The text that a token adds: all whole characters, and nothing of an incomplete one."""
        if self._is_whole:
            assert self._text_after is not None
            added = self._text_after(token_id)
            if added and added[-1] != _REPLACEMENT:  # `_is_whole`, without a call for each token
                self._window = [token_id]
                self._num_read = 1
                self._is_stale = True
                return added
        return self._push(token_id)

    def _push(self, token_id: int) -> str:
        if self._is_stale:
            self._prefix = self._decode(self._window)
            self._is_stale = False
        self._window.append(token_id)
        text = self._decode(self._window)
        num_pending = len(self._window) - self._num_read
        incomplete = text.endswith(_REPLACEMENT) or len(text) <= len(self._prefix)
        if incomplete and num_pending < _MAX_PENDING_TOKENS:
            self._is_whole = False
            return self._whole(text)
        added = text[len(self._prefix) + self._num_returned :]
        del self._window[: self._num_read]
        self._num_read = len(self._window)
        self._num_returned = 0
        self._prefix = self._decode(self._window)
        self._is_whole = _is_whole(self._prefix) and self._text_after is not None
        return added

    def _whole(self, text: str) -> str:
        """What stands in front of a last, incomplete character.

        A token may hold a whole character and half of the next, and be the last one. A decoder that
        shows all bytes in a row as replacements if one is missing has changed the text before.
        """
        if not text.startswith(self._prefix):
            return ""
        added = text[len(self._prefix) + self._num_returned :].rstrip(_REPLACEMENT)
        self._num_returned += len(added)
        return added


def _is_whole(text: str) -> bool:
    """Whether a text has characters, and the last one is whole."""
    return bool(text) and text[-1] != _REPLACEMENT
