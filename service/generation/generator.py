"""Generates text for valid requests: engine tokens in, text events out.

Closing a stream of events closes the engine's, which aborts its sequence.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from engine.protocol import request as engine

from ..call_record import CallRecord, current_record
from ..errors import ErrorKind, ServiceError
from ..text.tokenizer import TextTokenizer
from ..workers.gather import gather
from .engines import Engines
from .generation import Generation, TokenEvent
from .parameters import GenerationRequest
from .progress import Progress
from .validation import random_seed


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
        progress = Progress(request, self._tokenizer, received, validated, choice)
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
