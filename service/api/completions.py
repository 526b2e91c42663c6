"""Prompts that are to be continued, in the shape of OpenAI's older endpoint."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from ..codec import convert
from ..codec.presenter import Reply
from ..errors import ServiceError, fields_named
from ..generation.generation import Generation
from ..generation.server_info import ServerInfo
from ..generation.turns import round_robin
from ..openai.completions import (
    FIELD_NAMES,
    CompletionAnswer,
    CompletionsRequest,
    CompletionStream,
)
from ..openai.head import Head
from ..openai.usage import StreamUsage, Usage
from ..text.tokenizer import TextTokenizer
from .call import Call
from .generations import Generations
from .image_prompts import ImagePrompts
from .replies import alone, as_it_is, check_unary
from .whole_replies import WholeReplies


class Completions:
    """Continues one or several prompts.

    Args:
        generations: of the calls.
        images: of prompts.
        replies: that are whole.
        tokenizer: of the model.
        server: what is served.
    """

    def __init__(
        self,
        generations: Generations,
        images: ImagePrompts,
        replies: WholeReplies,
        tokenizer: TextTokenizer,
        server: ServerInfo,
    ) -> None:
        self._generations = generations
        self._images = images
        self._replies = replies
        self._tokenizer = tokenizer
        self._server = server

    async def answer(self, wanted: CompletionsRequest, call: Call) -> AsyncGenerator[Reply]:
        """The continuations, whole or token by token."""
        wanted.check(self._server.limits)
        head = self._head(wanted)
        with fields_named(FIELD_NAMES):
            wanted = await self._pictured(wanted)
            if not wanted.stream:
                present = call.presenter.completions
                return alone(await self._answer(wanted, head, call, present))
            self._generations.check_stream(wanted.parameters)
        messages = self._deltas(wanted, head, call)
        return self._generations.presented(messages, wanted.prompts, call, as_it_is, openai=True)

    async def answer_unary(self, wanted: CompletionsRequest, call: Call) -> Reply:
        """The whole continuations in one message: typed only."""
        check_unary(wanted.stream)
        wanted.check(self._server.limits)
        with fields_named(FIELD_NAMES):
            wanted = await self._pictured(wanted)
            head = self._head(wanted)
            return await self._answer(wanted, head, call, convert.completion)

    def _head(self, wanted: CompletionsRequest) -> Head:
        return Head.begin("cmpl-", wanted.parameters.adapter_id, self._server)

    async def _pictured(self, request: CompletionsRequest) -> CompletionsRequest:
        """Prompts with the images that their Markdown shows."""
        prompts = [await self._images.of_text(prompt) for prompt in request.prompts]
        return replace(request, prompts=tuple(prompts))

    async def _answer(
        self,
        wanted: CompletionsRequest,
        head: Head,
        call: Call,
        present: Callable[[CompletionAnswer], Reply],
    ) -> Reply:
        results = await self._generations.run_prompts(
            wanted.prompts, wanted.parameters, wanted.num_choices, call
        )
        done = [result for choices in results for result in choices]
        decode = self._tokenizer.decode
        answer = await self._replies.run(done, lambda: wanted.answer(head, results, decode))
        await self._generations.send_headers(answer.choices, call)
        return await self._replies.made(done, partial(present, answer))

    async def _deltas(
        self, wanted: CompletionsRequest, head: Head, call: Call
    ) -> AsyncGenerator[Reply]:
        finished: list[list[Generation]] = [[] for _ in wanted.prompts]
        parts = [
            CompletionStream(wanted, head, index, self._echoed(wanted, index))
            for index in range(len(wanted.prompts) * wanted.num_choices)
        ]
        streams = [
            self._generations.stream(prompt, wanted.parameters, call, wanted.num_choices)
            for prompt in wanted.prompts
        ]
        async with aclosing(round_robin(streams)) as turns:
            async for number, item in turns:
                if isinstance(item, ServiceError):
                    item.rename_field(FIELD_NAMES)
                    yield call.presenter.stream_error(item)
                    continue
                part = parts[number * wanted.num_choices + item.choice].push(item)
                yield call.presenter.completions_stream(part)
                if part.generation is not None:
                    finished[number].append(part.generation)
        if wanted.include_usage:
            usage = StreamUsage(head=head, usage=Usage.of_choices(finished))
            yield call.presenter.completions_usage(usage)

    def _echoed(self, wanted: CompletionsRequest, index: int) -> str:
        """The text that the continuation number `index` begins with."""
        if not wanted.echo:
            return ""
        prompt = wanted.prompts[index // wanted.num_choices]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
