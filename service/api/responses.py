"""Conversations that are to be continued, in the shape of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from ..codec.presenter import Reply
from ..generation.server_info import ServerInfo
from ..openai.head import Head
from ..openai.responses.request import ResponsesRequest, responses_fields
from ..openai.responses.stream import ResponseStream, answer
from .call import Call
from .conversations import Conversations
from .generations import Generations
from .replies import alone, as_it_is
from .whole_replies import WholeReplies


class Responses:
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

    async def answer(self, wanted: ResponsesRequest, call: Call) -> AsyncGenerator[Reply]:
        """The response, whole or event by event."""
        with responses_fields(wanted):
            wanted.check(self._server.limits)
            conversation = await self._conversations.of(wanted.chat, call)
            chat_request, prompt = conversation.request, conversation.prompt
        wanted = replace(wanted, chat=chat_request)  # with the tools in force
        head = Head.begin("resp_", chat_request.parameters.adapter_id, self._server)
        with responses_fields(wanted):
            if not chat_request.stream:
                result = await self._generations.run(prompt, chat_request.parameters, call)
                reply = await self._replies.made(
                    [result], lambda: call.presenter.response(answer(wanted, result, head))
                )
                return alone(reply)
            self._generations.check_stream(chat_request.parameters)
        stream = ResponseStream(wanted, head)
        messages = self._events(wanted, prompt, stream, call)
        failed = partial(call.presenter.response_failure, stream)
        return self._generations.presented(messages, [prompt], call, as_it_is, failed=failed)

    async def _events(
        self, wanted: ResponsesRequest, prompt: str, stream: ResponseStream, call: Call
    ) -> AsyncGenerator[Reply]:
        for event in stream.begin():
            yield call.presenter.response_event(event)
        generated = self._generations.stream(prompt, wanted.chat.parameters, call)
        with responses_fields(wanted):
            async with aclosing(generated) as tokens:
                async for token in tokens:
                    for event in stream.push(token):
                        yield call.presenter.response_event(event)
