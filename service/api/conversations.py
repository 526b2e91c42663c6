"""The prompts of conversations: templates, tools and images are put into them."""

from __future__ import annotations

import time
from dataclasses import replace

from ..call_record import note_conversation, note_operation
from ..errors import ErrorKind, ServiceError
from ..generation.metrics import Metrics
from ..generation.server_info import ServerInfo
from ..openai.chat import ChatRequest, Conversation, Draft, dialect_of, tool_call_format
from ..text.tokenizer import TextTokenizer
from ..workers.lanes import Lanes
from .call import Call
from .image_prompts import ImagePrompts

# Of a conversation that is prepared on the event loop: tools take most, 0.8 ms per KiB.
_SMALL_BYTES = 6 * 1024


class Conversations:
    """Makes prompts of conversations.

    Args:
        server: what is served.
        tokenizer: has the chat template.
        lanes: of large requests.
        images: of conversations.
        metrics: counts those that fail.
    """

    def __init__(
        self,
        server: ServerInfo,
        tokenizer: TextTokenizer,
        lanes: Lanes,
        images: ImagePrompts,
        metrics: Metrics,
    ) -> None:
        self._server = server
        self._tokenizer = tokenizer
        self._lanes = lanes
        self._images = images
        self._metrics = metrics
        self._dialect = dialect_of(tokenizer, server)

    async def of_chat(self, request: ChatRequest, call: Call) -> Conversation:
        """The prompt of a request to the chat, whose answer has calls in the caller's form.

        Raises:
            ServiceError: the conversation or the template cannot be used.
        """
        setting = self._server.tool_call_format
        call_format = tool_call_format(setting, call.metadata, request.tools)
        try:
            return await self.of(replace(request, tool_call_format=call_format), call)
        except ServiceError as error:
            if error.kind is ErrorKind.TEMPLATE:  # as in TGI, which counts no others before these
                self._metrics.requests.failed("template", time.monotonic() - call.received)
            raise

    async def of(self, request: ChatRequest, call: Call) -> Conversation:
        """The prompt of a conversation, with its images.

        Raises:
            ServiceError: the conversation or the template cannot be used.
        """
        return await self._images.of_conversation(await self._prompted(request, call))

    async def _prompted(self, request: ChatRequest, call: Call) -> Conversation:
        note_operation("chat")
        note_conversation(request.texts())
        escapes = request.escape_special_tokens
        if escapes is None:
            escapes = self._server.escape_special_tokens
        request = replace(request, escape_special_tokens=escapes)
        num_bytes, tokenizer = call.num_bytes, self._tokenizer
        processes = tokenizer.processes_for_chat(num_bytes, len(request.messages))
        given = (request, tokenizer, self._server.limits, self._dialect)
        if processes is None:
            return await self._lanes.run_read(num_bytes, _SMALL_BYTES, Conversation.of, *given)
        draft = await self._lanes.run_read(num_bytes, _SMALL_BYTES, Draft.of, *given)
        text = await processes.render(draft.messages, draft.tools, draft.variables, num_bytes)
        return await self._lanes.run_read(
            num_bytes, _SMALL_BYTES, draft.conversation, text, tokenizer
        )
