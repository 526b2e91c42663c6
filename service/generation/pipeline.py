"""Runs a generation from its parameters to its text: permit, validation, generation, metrics.

Every generation endpoint of both transports uses it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager

from ..call_record import (
    CANCELLED,
    current_record,
    note_error,
    note_prompt,
    note_request,
    note_text,
)
from ..errors import ErrorKind, ServiceError
from .admission import Admission
from .generation import Generation, TokenEvent
from .generator import Generator
from .metrics import Metrics
from .parameters import GenerationRequest, Parameters, Prompt
from .running import RunningCalls
from .turns import round_robin
from .validation import Validator

_FAILURES = {
    ErrorKind.CANCELLED: "dropped",
    ErrorKind.OVERLOADED: "overloaded",
    ErrorKind.GENERATION: "generation",
    ErrorKind.INCOMPLETE: "incomplete",
    ErrorKind.UNHEALTHY: "generation",
}


class Pipeline:
    """Runs the stages of a request one after the other.

    Args:
        admission: gives permits.
        validator: makes valid requests.
        generator: makes texts of them.
        metrics: where requests are counted.
        own_calls_only: whether callers can end only calls of their own.
    """

    def __init__(
        self,
        admission: Admission,
        validator: Validator,
        generator: Generator,
        metrics: Metrics,
        *,
        own_calls_only: bool = False,
    ) -> None:
        self._admission = admission
        self._validator = validator
        self._generator = generator
        self._metrics = metrics
        self._running = RunningCalls(generator.abort, own_only=own_calls_only)

    def permit(self) -> AbstractContextManager[object]:
        """Holds a permit for work that generates nothing.

        Raises:
            ServiceError: none is left.
        """
        return self._admission.permit()

    def check_stream(self, parameters: Parameters) -> None:
        """Checks before a stream's headers what a status can say better than an event.

        Raises:
            ServiceError: the server is shutting down, so that Envoy can ask another process; or
                there is no such adapter.
        """
        try:
            self._admission.check_open()
            self._validator.check_adapter(parameters)
        except ServiceError:
            with self._counted():  # the stream, which does not begin, would have counted itself
                raise

    async def run(self, prompt: Prompt, parameters: Parameters, received: float) -> Generation:
        """Generates to the end. `received` is when the request came, in monotonic seconds.

        Raises:
            ServiceError: the request is refused, or generation failed.
        """
        note_request(parameters, 1, is_stream=False)
        with self._counted(), self._running.entered():
            self._validator.check_best_of(parameters)
            with self._admission.permit(max(parameters.best_of or 1, 1)):
                request = await self._validate(prompt, parameters)
                result = await self._generator.run(request, received, time.monotonic())
        self._finish([result])
        return result

    async def run_choices(
        self, prompt: Prompt, parameters: Parameters, n: int, received: float
    ) -> list[Generation]:
        """Generates `n` texts of one prompt to their ends; see `run`.

        Raises:
            ServiceError: the request is refused, or generation failed.
        """
        note_request(parameters, n, is_stream=False)
        with self._counted(), self._running.entered(), self._admission.permit(n):
            request = await self._validate(prompt, parameters)
            results = await self._generator.run_choices(request, n, received, time.monotonic())
        self._finish(results)
        return results

    async def stream(
        self, prompt: Prompt, parameters: Parameters, received: float, n: int = 1
    ) -> AsyncGenerator[TokenEvent]:
        """One event per token of `n` texts of one prompt, in turn.

        Closing the generator ends the work in the engine.

        Raises:
            ServiceError: the request is refused, or a generation failed, which ends the others.
        """
        note_request(parameters, n, is_stream=True)
        with self._counted(), self._running.entered():
            self._validator.check_stream(parameters)
            with self._admission.permit(n) as permit:
                request = await self._validate(prompt, parameters)
                streams = self._generator.choices(
                    request, n, received, time.monotonic(), permit.release_one
                )
                finished: list[Generation] = []
                in_turn = streams[0] if n == 1 else _merged(streams)
                async with aclosing(in_turn) as events:
                    async for event in events:
                        if event.generation is not None:
                            finished.append(event.generation)
                            if len(finished) == n:
                                break
                        yield event
        self._finish(finished)
        yield event  # the last: whoever leaves now has not dropped a generation

    def abort(self, request_id: str, caller: str | None) -> int:
        """Ends the generations of all calls of this id; returns how many there were.

        Args:
            request_id: the calls' id.
            caller: who asks for that, if it is known.
        """
        return self._running.abort(request_id, caller)

    async def closed(self) -> None:
        """Returns once new generations are refused, because the server shuts down."""
        await self._admission.closed()

    def _finish(self, results: list[Generation]) -> None:
        """Counts a request, whose prompt all its texts share."""
        num_generated = sum(len(result.tokens) for result in results)
        last = max(results, key=lambda result: result.timings.finished)
        self._metrics.requests.finished(last, num_generated)
        for result in results:
            note_text(result.text, result.finish_reason)

    def _failed(self, reason: str, begun: float) -> None:
        record = current_record()
        received = begun if record is None else record.began
        self._metrics.requests.failed(reason, time.monotonic() - received)

    async def _validate(self, prompt: Prompt, parameters: Parameters) -> GenerationRequest:
        if isinstance(prompt, str):
            note_prompt(prompt)
        request = await self._validator.validate(prompt, parameters)
        self._metrics.requests.validated(len(request.prompt_token_ids), request.max_new_tokens)
        return request

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._metrics.requests.begun()
        begun = time.monotonic()
        try:
            yield
        except ServiceError as error:
            if error.kind is ErrorKind.OVERLOADED and error.retry_after_s is None:
                error.retry_after_s = self._admission.retry_after_s()
            self._failed(_FAILURES.get(error.kind, "validation"), begun)
            note_error(error.kind.error_type)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            note_error(CANCELLED)
            self._failed("dropped", begun)
            raise


async def _merged(streams: list[AsyncGenerator[TokenEvent]]) -> AsyncGenerator[TokenEvent]:
    """One event of each stream in turn.

    Raises:
        ServiceError: one of them has failed, which ends the others.
    """
    async with aclosing(round_robin(streams)) as turns:
        async for _, event in turns:
            if isinstance(event, ServiceError):
                raise event
            yield event
