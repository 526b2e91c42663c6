"""Generates text for valid requests: engine tokens in, text events out.

Stop sequences need text, so they are found here; closing the engine's stream aborts its sequence.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import orjson

from engine.protocol import request as engine

from ..call_record import CallRecord, current_record, note_tokens
from ..errors import ErrorKind, ServiceError
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import TextTokenizer
from ..workers.gather import gather
from .engines import Engines
from .lazy import Lazy
from .parameters import GenerationRequest
from .validation import random_seed

STOP_SEQUENCE = "stop_sequence"
_made = tuple.__new__  # a named tuple of all its values: half the time of its own way


class Token(NamedTuple):
    """One token as callers see it. `logprob` is None when it is not a finite number."""

    id: int
    text: str
    logprob: float | None
    special: bool


@dataclass(frozen=True, slots=True)
class PrefillToken:
    """One token of the prompt, and the likeliest tokens at its place if they were asked for."""

    id: int
    text: str
    logprob: float | None
    top_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """When a request passed its stages, in seconds of the monotonic clock.

    Attributes:
        received: when the call arrived.
        validated: when it was valid and was sent to the engine.
        started: when the engine reported its first step.
        finished: when its last token arrived.
        first_token: when its first token arrived.
    """

    received: float
    validated: float
    started: float
    finished: float
    first_token: float | None = None

    def per_output_token(self, num_tokens: int) -> float | None:
        """Mean seconds between two of so many tokens; None where there are no two."""
        if self.first_token is None or num_tokens < 2:
            return None
        return (self.finished - self.first_token) / (num_tokens - 1)

    @property
    def total(self) -> float:
        """Seconds from receipt to the end."""
        return self.finished - self.received

    @property
    def validation(self) -> float:
        """Seconds from receipt until the request was queued."""
        return self.validated - self.received

    @property
    def queue(self) -> float:
        """Seconds in the queue, until its first step."""
        return self.started - self.validated

    @property
    def inference(self) -> float:
        """Seconds from its first step to the end."""
        return self.finished - self.started


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished text. `seed` is None for greedy generation.

    `num_cached_tokens` are those of the prompt that the KV cache had already. `matched_stop` is the
    stop sequence or the stop token that ended the text.
    """

    request: GenerationRequest
    text: str
    finish_reason: str
    tokens: Sequence[Token]
    top_tokens: Sequence[list[Token]]
    prefill: Sequence[PrefillToken]
    seed: int | None
    timings: Timings
    num_cached_tokens: int = 0
    matched_stop: str | int | None = None
    best_of_sequences: list[Generation] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, after truncation."""
        return len(self.request.prompt_token_ids)

    @property
    def generated_text(self) -> str:
        """The text, with the prompt in front if that was asked for."""
        if not self.request.detokenize:
            return ""
        return self.request.inputs + self.text if self.request.return_full_text else self.text

    def release(self) -> None:
        """Frees what its tokens took, once nothing reads them any more; see `Lazy.release`."""
        for listed in (self.tokens, self.top_tokens):
            if isinstance(listed, Lazy):
                listed.release()
        for other in self.best_of_sequences:
            other.release()

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of a token, which `best_of` ranks by."""
        return sum(token.logprob or 0.0 for token in self.tokens) / max(len(self.tokens), 1)


class TokenEvent(NamedTuple):
    """One token of a stream; the last one carries the whole generation.

    `number` counts a text's tokens from 1, and `choice` the texts of a prompt from 0.
    """

    token: Token
    top_tokens: Sequence[Token]
    generation: Generation | None = None
    number: int = 1
    choice: int = 0


class Generator:
    """Turns valid requests into text."""

    def __init__(self, client: Engines, tokenizer: TextTokenizer) -> None:
        self._client = client
        self._tokenizer = tokenizer

    async def run(
        self, request: GenerationRequest, received: float, validated: float
    ) -> Generation:
        """Generates to the end; with `best_of` above 1, several times at once.

        `received` and `validated` are when that happened, in monotonic seconds.

        Raises:
            ServiceError: generation failed.
        """
        if request.best_of == 1:
            return await _result_of(self.stream(request, received, validated))
        candidates = [_with_own_seed(request) for _ in range(request.best_of)]
        streams = self._sharing_prompt(candidates, received, validated)
        results = await gather(_result_of(stream) for stream in streams)
        best = max(results, key=lambda item: item.mean_logprob)  # the first of equals, as in TGI
        return replace(best, best_of_sequences=[item for item in results if item is not best])

    async def stream(
        self,
        request: GenerationRequest,
        received: float,
        validated: float,
        on_end: Callable[[], object] = lambda: None,
        choice: int = 0,
    ) -> AsyncGenerator[TokenEvent]:
        """One event per token. Closing the iterator ends the work in the engine.

        `on_end` is called when the engine is done, which may be long before the events are read.

        Raises:
            ServiceError: generation failed.
        """
        progress = _Progress(request, self._tokenizer, received, validated, choice)
        outputs = self._client.generate(self._engine_request(request), on_end)
        num_tokens = 0
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    event = progress.push(output)
                    if event is not None:
                        num_tokens = event.number
                        yield event
                        if event.generation is not None:
                            return
        finally:  # also where it fails, or nobody wants the rest
            progress.note_tokens(num_tokens)
        raise ServiceError(ErrorKind.INCOMPLETE, "Incomplete generation")

    def abort(self, call: CallRecord) -> None:
        """Fails what the engine computes for a call."""
        self._client.abort(call)

    def choices(
        self,
        request: GenerationRequest,
        n: int,
        received: float,
        validated: float,
        on_end: Callable[[], object] = lambda: None,
    ) -> list[AsyncGenerator[TokenEvent]]:
        """Streams of `n` texts of one prompt, like `stream`; the request's seed decides theirs.

        All have to be read at the same time. `on_end` is called for each.
        """
        wanted = [_with_choice_seed(request, index) for index in range(n)]
        return self._sharing_prompt(wanted, received, validated, on_end)

    async def run_choices(
        self, request: GenerationRequest, n: int, received: float, validated: float
    ) -> list[Generation]:
        """Generates `n` texts of one prompt to their ends.

        Raises:
            ServiceError: generation failed.
        """
        streams = self.choices(request, n, received, validated)
        results = await gather(_result_of(stream) for stream in streams)
        return [replace(result, prefill=results[0].prefill) for result in results]

    def _sharing_prompt(
        self,
        requests: list[GenerationRequest],
        received: float,
        validated: float,
        on_end: Callable[[], object] = lambda: None,
    ) -> list[AsyncGenerator[TokenEvent]]:
        """Streams for requests with the same prompt, which is computed once.

        The first computes it, and the others find it in the KV cache, since they begin later.
        """
        is_computed = asyncio.Event()
        first, *others = (
            self.stream(request, received, validated, on_end, choice)
            for choice, request in enumerate(requests)
        )
        if not others:
            return [first]
        return [_leading(first, is_computed), *(_after(is_computed, item) for item in others)]

    def _engine_request(self, request: GenerationRequest) -> engine.Request:
        record = current_record()
        return engine.Request(
            request_id=self._client.new_request_id(),
            prompt_token_ids=request.prompt_token_ids,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            eos_token_ids=frozenset() if request.ignore_eos else self._tokenizer.eos_token_ids,
            stop_token_ids=request.stop_token_ids,
            min_new_tokens=request.min_new_tokens,
            prompt_logprobs=request.decoder_input_details,
            prompt_top_n=request.prompt_top_n_tokens,
            grammar=request.grammar,
            adapter=request.adapter,
            caller="" if record is None else record.caller,
            priority=request.priority,
            images=request.images,
        )


class _Progress:
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
            return STOP_SEQUENCE
        if engine_reason is not None:
            return engine_reason
        self._matched_stop = stop
        return "" if stop is None else STOP_SEQUENCE

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


def shortest_float32(value: float | None) -> float | None:
    """The double that prints as the shortest decimal of the same float32, as in TGI's JSON.

    None for None and for numbers that JSON lacks: NaN and the infinities.
    """
    if value is None:
        return None
    # numpy's own text has the same digits and takes half as long again.
    text = orjson.dumps(np.float32(value), option=orjson.OPT_SERIALIZE_NUMPY)
    short: float | None = orjson.loads(text)
    return short


def shortest_float32s(values: Sequence[float | None]) -> list[float | None]:
    """The same of many at once."""
    text = orjson.dumps(np.array(values, np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
    short: list[float | None] = orjson.loads(text)
    return short


def _with_own_seed(request: GenerationRequest) -> GenerationRequest:
    return replace(request, best_of=1, sampling=replace(request.sampling, seed=random_seed()))


def _with_choice_seed(request: GenerationRequest, index: int) -> GenerationRequest:
    """The request of a choice: the first has the request's seed, all others one made of it.

    The first alone tells of the prompt, because what is in the cache has no log-probabilities.
    """
    if index == 0:
        return request
    request = replace(request, decoder_input_details=False, prompt_top_n_tokens=0)
    seed = request.sampling.seed.to_bytes(8) + index.to_bytes(4)
    own = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest())
    return replace(request, sampling=replace(request.sampling, seed=own))


async def _result_of(stream: AsyncGenerator[TokenEvent]) -> Generation:
    """The generation at the end of a stream.

    Raises:
        ServiceError: generation failed.
    """
    async with aclosing(stream) as events:
        async for event in events:
            if event.generation is not None:
                return event.generation
    raise ServiceError(ErrorKind.INCOMPLETE, "Incomplete generation")


async def _leading(
    events: AsyncGenerator[TokenEvent], has_begun: asyncio.Event
) -> AsyncGenerator[TokenEvent]:
    """The same events; sets `has_begun` with the first of them, or at the end."""
    try:
        async with aclosing(events):
            async for event in events:
                has_begun.set()
                yield event
    finally:
        has_begun.set()


async def _after(
    may_begin: asyncio.Event, events: AsyncGenerator[TokenEvent]
) -> AsyncGenerator[TokenEvent]:
    """The same events, once they may begin."""
    async with aclosing(events):
        await may_begin.wait()
        async for event in events:
            yield event
