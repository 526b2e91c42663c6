"""Conversations that are to be continued, in the shape of OpenAI's chat."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from ..codec import convert
from ..codec.presenter import Reply
from ..errors import fields_named
from ..generation.generation import TokenEvent
from ..generation.server_info import ServerInfo
from ..openai import chat_answer
from ..openai.chat import ChatRequest
from ..openai.chat_answer import ChatAnswer, ChatStream
from ..openai.head import Head
from ..openai.usage import StreamUsage, Usage
from .call import Call
from .conversations import Conversations
from .generations import Generations
from .replies import alone, as_it_is, check_unary
from .whole_replies import WholeReplies


class Chats:
    """Continues conversations.

    Args:
        generations: of the calls.
        conversations: makes prompts.
        replies: that are whole.
        server: what is served.
    """

    def __init__(
        self,
        generations: Generations,
        conversations: Conversations,
        replies: WholeReplies,
        server: ServerInfo,
    ) -> None:
        self._generations = generations
        self._conversations = conversations
        self._replies = replies
        self._server = server

    async def answer(self, request: ChatRequest, call: Call) -> AsyncGenerator[Reply]:
        """The answer, whole or token by token."""
        conversation = await self._conversations.of_chat(request, call)
        wanted, prompt = conversation.request, conversation.prompt
        head = self._head(wanted)
        with fields_named(wanted.field_names):
            if not wanted.stream:
                present = call.presenter.chat
                return alone(await self._answer(wanted, prompt, head, call, present))
            self._generations.check_stream(wanted.parameters)
        messages = self._deltas(wanted, prompt, head, call)
        return self._generations.presented(messages, [prompt], call, as_it_is, openai=True)

    async def answer_unary(self, request: ChatRequest, call: Call) -> Reply:
        """The whole answer in one message: typed only, since no REST path has it."""
        check_unary(request.stream)
        conversation = await self._conversations.of_chat(request, call)
        wanted = conversation.request
        with fields_named(wanted.field_names):
            head = self._head(wanted)
            present = convert.chat_completion
            return await self._answer(wanted, conversation.prompt, head, call, present)

    def _head(self, wanted: ChatRequest) -> Head:
        return Head.begin("chatcmpl-", wanted.parameters.adapter_id, self._server)

    async def _answer(
        self,
        wanted: ChatRequest,
        prompt: str,
        head: Head,
        call: Call,
        present: Callable[[Sequence[ChatAnswer]], Reply],
    ) -> Reply:
        results = await self._generations.run_choices(
            prompt, wanted.parameters, wanted.num_choices, call
        )
        return await self._replies.made(
            results,
            lambda: present([chat_answer.answer(wanted, result, head) for result in results]),
        )

    async def _deltas(
        self, wanted: ChatRequest, prompt: str, head: Head, call: Call
    ) -> AsyncGenerator[Reply]:
        finished = []
        answers = [ChatStream(wanted, head, index) for index in range(wanted.num_choices)]
        generated = self._generations.stream(prompt, wanted.parameters, call, wanted.num_choices)
        async with aclosing(_renaming(generated, wanted.field_names)) as events:
            async for event in events:
                for part in answers[event.choice].push(event):
                    yield call.presenter.chat_stream(part)
                if event.generation is not None:
                    finished.append(event.generation)
        if wanted.include_usage:
            usage = StreamUsage(head=head, usage=Usage.of_choices([finished]))
            yield call.presenter.chat_usage(usage)


async def _renaming(
    events: AsyncGenerator[TokenEvent], names: Mapping[str, str]
) -> AsyncGenerator[TokenEvent]:
    """The same, with the endpoint's own names of fields in its failure."""
    with fields_named(names):
        async with aclosing(events):
            async for event in events:
                yield event
