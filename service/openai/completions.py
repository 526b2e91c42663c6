"""Several prompts in one request: OpenAI's older endpoint with TGI's rules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ..errors import ErrorKind, ServiceError, missing_field
from ..generation.generator import Generation, TokenEvent
from ..generation.limits import Limits
from ..generation.parameters import Parameters, Prompt
from .head import Head
from .usage import Usage

# What this endpoint calls the fields of `/generate`; the others have the same names.
FIELD_NAMES = {
    "inputs": "prompt",
    "input_ids": "prompt_ids",
    "parameters.max_new_tokens": "max_tokens",
    "parameters.min_new_tokens": "min_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsRequest:
    """Prompts to continue. `parameters` already has the names of `/generate`."""

    prompts: tuple[Prompt, ...]
    parameters: Parameters
    stream: bool = False
    suffix: str | None = None
    include_usage: bool = False

    def check(self, limits: Limits) -> None:
        """Checks what only this endpoint has, in TGI's order.

        Raises:
            ServiceError: the request asks for what cannot be done.
        """
        if self.suffix is not None:
            raise ServiceError(
                ErrorKind.SUFFIX,
                "Suffix is not supported and can be achieved by preprocessing the prompt.",
                field="suffix",
            )
        if not self.prompts:
            raise missing_field("prompt")
        if len(self.prompts) > limits.max_client_batch_size:
            raise ServiceError(
                ErrorKind.BATCH_SIZE,
                "Number of prompts exceeds the maximum allowed batch size of "
                f"{limits.max_client_batch_size}",
                field="prompt",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAnswer:
    """All continuations, in the prompts' order."""

    head: Head
    generations: list[Generation]

    @property
    def usage(self) -> Usage:
        """Of all prompts together."""
        return Usage.of(self.generations)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionDelta:
    """One token of one continuation. TGI sends control tokens' text here, too.

    The last token has the finish reason and the whole generation, of which gRPC callers get more.
    """

    head: Head
    index: int
    text: str
    finish_reason: str | None = None
    generation: Generation | None = None

    @classmethod
    def of(cls, index: int, event: TokenEvent, head: Head) -> CompletionDelta:
        """The part that a token adds to the continuation of the prompt number `index`."""
        return cls(
            head=head,
            index=index,
            text=event.token.text,
            finish_reason=event.generation.finish_reason if event.generation else None,
            generation=event.generation,
        )


async def round_robin(
    streams: list[AsyncGenerator[TokenEvent]],
) -> AsyncGenerator[tuple[int, TokenEvent | ServiceError]]:
    """One event of each stream in turn, with the stream's number, until all have ended.

    A stream that fails yields its error in its turn; the others go on. All streams work at the same
    time: each is one event ahead of the reader.
    """
    ahead = {index: asyncio.create_task(_next(stream)) for index, stream in enumerate(streams)}
    try:
        while ahead:
            for index in list(ahead):
                event = await ahead[index]
                if isinstance(event, TokenEvent):
                    ahead[index] = asyncio.create_task(_next(streams[index]))
                else:
                    del ahead[index]
                if event is not None:
                    yield index, event
    finally:
        for task in ahead.values():
            task.cancel()
        await asyncio.gather(*ahead.values(), return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[TokenEvent]) -> TokenEvent | ServiceError | None:
    """The next event of a stream, or its failure; None at its end."""
    try:
        return await anext(stream, None)
    except ServiceError as error:
        return error
