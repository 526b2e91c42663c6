"""The generations that calls ask for, with the headers of their replies.

A failure before a stream's headers are sent is raised and gets a status of its own. A later one is
presented: as an event to REST callers, as a status to gRPC callers.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from ..call_record import note_error
from ..codec import headers
from ..codec.presenter import Reply
from ..errors import ErrorKind, ServiceError, internal
from ..generation.generation import Generation, TokenEvent
from ..generation.parameters import Parameters, Prompt
from ..generation.pipeline import Pipeline
from ..workers.gather import gather
from .call import Call

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

KEEP_ALIVE_S = 15.0  # TGI's interval: axum's KeepAlive


class Generations:
    """Runs the generations of calls.

    Args:
        pipeline: runs each of them.
        compute_type: what headers say of the device.
    """

    def __init__(self, pipeline: Pipeline, compute_type: str) -> None:
        self._pipeline = pipeline
        self._compute_type = compute_type

    def check_stream(self, parameters: Parameters) -> None:
        """See `Pipeline.check_stream`."""
        self._pipeline.check_stream(parameters)

    async def run(self, prompt: Prompt, parameters: Parameters, call: Call) -> Generation:
        """Generates one text and sends the headers of its reply.

        Raises:
            ServiceError: the request is refused, or generation failed.
        """
        result = await self._pipeline.run(prompt, parameters, call.received)
        await call.send_headers(headers.of_generation(result, self._compute_type))
        return result

    async def run_choices(
        self, prompt: Prompt, parameters: Parameters, n: int, call: Call
    ) -> list[Generation]:
        """Generates `n` texts of one prompt and sends the headers of their reply.

        Raises:
            ServiceError: the request is refused, or generation failed.
        """
        results = await self._pipeline.run_choices(prompt, parameters, n, call.received)
        await call.send_headers(headers.of_choices(results, self._compute_type))
        return results

    async def run_prompts(
        self, prompts: Sequence[Prompt], parameters: Parameters, n: int, call: Call
    ) -> list[list[Generation]]:
        """Generates `n` texts of each prompt; `send_headers` is to follow.

        Raises:
            ServiceError: the request is refused, or a generation failed, which ends the others.
        """
        return await gather(
            self._pipeline.run_choices(prompt, parameters, n, call.received) for prompt in prompts
        )

    async def send_headers(self, results: list[list[Generation]], call: Call) -> None:
        """Sends the headers of a reply with the texts of several prompts."""
        await call.send_headers(headers.of_generations(results, self._compute_type))

    def stream(
        self, prompt: Prompt, parameters: Parameters, call: Call, n: int = 1
    ) -> AsyncGenerator[TokenEvent]:
        """The tokens of `n` texts of one prompt; see `Pipeline.stream`."""
        return self._pipeline.stream(prompt, parameters, call.received, n)

    async def presented(
        self,
        messages: AsyncGenerator[_T],
        prompts: Sequence[Prompt],
        call: Call,
        present: Callable[[_T], Reply],
        *,
        openai: bool = False,
        failed: Callable[[ServiceError], Sequence[Reply]] | None = None,
    ) -> AsyncGenerator[Reply]:
        """Sends a stream's headers; yields its messages, failure and end mark."""
        failed = failed or call.presenter.stream_failure
        await call.begin_stream(headers.of_stream(prompts, self._compute_type))
        filler = call.presenter.keep_alive()
        if filler is not None:
            call.keep_alive(filler, KEEP_ALIVE_S)
        call.end_unread_by(messages.aclose)
        try:
            async with aclosing(messages):
                async for message in messages:
                    yield present(message)
            if call.failure is not None:
                raise call.failure
        except ServiceError as error:
            note_error(error.kind.error_type)
            for reply in failed(error):
                yield reply
        except Exception:
            logger.exception("a stream failed unexpectedly")
            note_error(ErrorKind.INTERNAL.error_type)
            for reply in failed(internal()):
                yield reply
        if openai and (end := call.presenter.stream_end()) is not None:
            yield end
