"""The text and tokens of a request so far. Stop sequences need text, so they are found here."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engine.protocol import request as engine

from ..call_record import note_tokens
from ..errors import ErrorKind, ServiceError
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import TextTokenizer
from .float32 import shortest_float32, shortest_float32s
from .generation import Generation, PrefillToken, Timings, Token, TokenEvent
from .lazy import Lazy
from .parameters import GenerationRequest

_STOP_SEQUENCE = "stop_sequence"
_made = tuple.__new__  # a named tuple of all its values: half the time of its own way


class Progress:
    """The text and tokens of one request so far."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: TextTokenizer,
        received: float,
        validated: float,
        choice: int,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._choice = choice
        self._detokenize = request.detokenize
        self._stop = request.stop
        self._top_n_tokens = request.sampling.top_n_tokens
        self._special_ids = tokenizer.special_ids
        self._detokenizer = Detokenizer(
            tokenizer.decode, request.prompt_token_ids, tokenizer.text_after
        )
        self._received = received
        self._validated = validated
        self._started: float | None = None
        self._first_token: float | None = None
        self._num_cached_tokens = 0
        self._matched_stop: str | int | None = None
        # Those of `Token`; plain tuples, which the garbage collector need not visit again.
        self._tokens: list[tuple[int, str, float | None, bool]] = []
        self._texts: list[str] = []  # of those that are not special
        self._tops: list[tuple[tuple[int, float], ...]] = []
        self._prompt_logprobs: list[float | None] = []
        self._prompt_tops: list[tuple[tuple[int, float], ...]] = []
        self._tail = ""  # the end of all text so far, special tokens included, for stop sequences
        self._tail_size = max(map(len, request.stop), default=0) + 1

    def push(self, output: engine.SequenceOutput) -> TokenEvent | None:
        """Adds one step's output and returns the event of its token, if it has one.

        Raises:
            ServiceError: the request failed in the engine.
        """
        if output.error is not None:
            raise ServiceError(ErrorKind.GENERATION, f"Server error: {output.error}")
        if output.first_scheduled and self._started is None:
            self._started = time.monotonic()
            self._num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs:
            self._prompt_logprobs += shortest_float32s(output.prompt_logprobs)
            self._prompt_tops += output.prompt_tops
        if output.token is None:
            return None
        if self._first_token is None:
            self._first_token = time.monotonic()
        token, top_tokens = self._append(output.token)
        generation = None
        if output.finish_reason is not None or self._stop:
            reason = self._reason(output.finish_reason, token.text)
            generation = self._finish(reason) if reason else None
        # By position and without its own `__new__`: every token makes one.
        return _made(TokenEvent, (token, top_tokens, generation, len(self._tokens), self._choice))

    def note_tokens(self, num_generated: int) -> None:
        """Notes for the call what there was of this text; texts of one prompt share it."""
        is_first = self._choice == 0
        num_prompt = len(self._request.prompt_token_ids) if is_first else 0
        num_cached = self._num_cached_tokens if is_first else 0
        note_tokens(num_prompt, num_generated, num_cached)

    def _append(self, raw: engine.Token) -> tuple[Token, Sequence[Token]]:
        token_id, logprob, top = raw
        text = self._detokenizer.push(token_id) if self._detokenize else ""
        special = token_id in self._special_ids
        values = (token_id, text, shortest_float32(logprob), special)
        self._tokens.append(values)
        if not special:
            self._texts.append(text)
        top_tokens = Lazy(self._likely, top) if top else ()
        if self._top_n_tokens:
            self._tops.append(top)
        return _made(Token, values), top_tokens

    def _reason(self, engine_reason: engine.FinishReason | None, text: str) -> str:
        """Why the text ends with this token, in the contract's words; empty if it does not."""
        stop = self._stop_at_end(text)
        if stop is not None and len(self._tokens) < self._request.min_new_tokens:
            stop = None
        if engine_reason is engine.FinishReason.STOP_TOKEN:
            self._matched_stop = self._tokens[-1][0]
            return _STOP_SEQUENCE
        if engine_reason is not None:
            return engine_reason
        self._matched_stop = stop
        return "" if stop is None else _STOP_SEQUENCE

    def _stop_at_end(self, text: str) -> str | None:
        """The stop sequence with which, or with which and a newline, the text now ends.

        TGI matches the expression `sequence$` at token boundaries only (tokens.py at v2.1.1,
        StopSequenceCriteria).
        """
        if not self._stop:
            return None
        self._tail = (self._tail + text)[-max(self._tail_size, len(text)) :]
        return next(
            (
                stop
                for stop in self._stop
                if self._tail.endswith(stop) or self._tail.endswith(stop + "\n")
            ),
            None,
        )

    def _finish(self, reason: str) -> Generation:
        sampling = self._request.sampling
        return Generation(
            request=self._request,
            text="".join(self._texts),
            finish_reason=reason,
            tokens=Lazy(Token._make, self._tokens),
            top_tokens=Lazy(self._likeliest, self._tops),
            prefill=self._prefill(),
            seed=sampling.seed if sampling.do_sample else None,
            timings=Timings(
                self._received,
                self._validated,
                self._started or self._validated,
                time.monotonic(),
                self._first_token,
            ),
            num_cached_tokens=self._num_cached_tokens,
            matched_stop=self._matched_stop,
        )

    def _prefill(self) -> Sequence[PrefillToken]:
        count = min(len(self._request.prompt_token_ids), len(self._prompt_logprobs))
        if self._prompt_tops:
            count = min(count, len(self._prompt_tops))
        return Lazy(self._prefill_token, range(count))

    def _prefill_token(self, index: int) -> PrefillToken:
        token_id = self._request.prompt_token_ids[index]
        top = self._prompt_tops[index] if self._prompt_tops else ()
        return PrefillToken(
            token_id,
            self._token_text(token_id),
            self._prompt_logprobs[index],
            tuple(self._likeliest(top)),
        )

    def _likeliest(self, top: tuple[tuple[int, float], ...]) -> list[Token]:
        """The likeliest tokens at some place."""
        return list(map(self._likely, top))

    def _likely(self, raw: tuple[int, float]) -> Token:
        token_id, logprob = raw
        special = token_id in self._special_ids
        return Token(token_id, self._token_text(token_id), shortest_float32(logprob), special)

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.token_text(token_id) if self._request.detokenize else ""
