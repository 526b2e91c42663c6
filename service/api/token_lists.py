"""Lists of the tokens of texts and of conversations' prompts, which may be long."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from ..codec import headers
from ..codec.presenter import Reply
from ..generation.limits import check_text
from ..generation.pipeline import Pipeline
from ..generation.server_info import ServerInfo
from ..openai.chat import ChatRequest
from ..text.long_texts import MAX_LIST_BYTES, Form
from ..text.tokenizer import TextTokenizer
from ..workers.allowance import Allowance
from .call import Call
from .conversations import Conversations
from .image_prompts import ImagePrompts

# Of a list of tokens in one message: more than clients of gRPC take unless they are told to.
_MAX_UNARY_LIST_BYTES = 4 * 1024**2
# Of one that Envoy may always hold until it has all of it: as much as it buffers of any connection.
_MAX_HELD_BYTES = 1024**2
# Of longer ones that it holds, in a time, since it keeps them for as long as a caller reads slowly:
# two of the largest.
_LONG_HELD_BYTES = 2 * MAX_LIST_BYTES
_LONG_HELD_S = 60.0


class TokenLists:
    """Lists tokens.

    Args:
        pipeline: gives the permits.
        tokenizer: of the model.
        server: what is served.
        images: of texts and conversations.
        conversations: makes prompts.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        tokenizer: TextTokenizer,
        server: ServerInfo,
        images: ImagePrompts,
        conversations: Conversations,
    ) -> None:
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._server = server
        self._images = images
        self._conversations = conversations
        self._held = Allowance(_LONG_HELD_BYTES, _LONG_HELD_S)

    async def whole(self, wanted: str | ChatRequest, call: Call) -> Reply:
        """The tokens of a text or of a conversation's prompt, in one message.

        Raises:
            ServiceError: the server is full, or the text cannot be used or has too many.
        """
        messages = self.messages(wanted, call, _MAX_UNARY_LIST_BYTES)
        return b"".join([message async for message in messages])

    async def messages(
        self, wanted: str | ChatRequest, call: Call, max_bytes: int = MAX_LIST_BYTES
    ) -> AsyncGenerator[bytes]:
        """The same, some of them in each message.

        Raises:
            ServiceError: the server is full, or the text cannot be used or has too many.
        """
        is_prompt = isinstance(wanted, ChatRequest)
        if isinstance(wanted, ChatRequest):
            self._server.adapters.chosen(wanted.parameters)
        with self._pipeline.permit():
            pass  # a full server refuses at once; no permit is held while images are awaited
        text = await self._spelled(wanted, call)
        async with AsyncExitStack() as memory:
            with self._pipeline.permit():  # not held while the caller reads
                field = "messages" if is_prompt else "inputs"
                check_text(field, text, self._server.limits)
                messages = await memory.enter_async_context(
                    self._listed(text, call, is_prompt=is_prompt, max_bytes=max_bytes)
                )
            num_bytes = sum(map(len, messages))
            if num_bytes <= _MAX_HELD_BYTES or self._held.take(num_bytes):
                await call.send_headers(headers.of_whole())
            while messages:
                yield messages.popleft()

    async def _spelled(self, wanted: str | ChatRequest, call: Call) -> str:
        """The text whose tokens are to be listed: of images, it has what stands for them."""
        if isinstance(wanted, str):
            prompt = await self._images.of_text(wanted)
            assert isinstance(prompt, str)
        else:
            prompt = (await self._conversations.of_chat(wanted, call)).prompt
        return await self._images.spelled(prompt)

    @asynccontextmanager
    async def _listed(
        self, text: str, call: Call, *, is_prompt: bool, max_bytes: int
    ) -> AsyncIterator[deque[bytes]]:
        processes = self._tokenizer.processes_for_list(text)
        if processes is not None:
            form: Form = "rest" if call.is_rest else "typed"
            listed = processes.tokens_listed(text, form, is_prompt=is_prompt, max_bytes=max_bytes)
            async with listed as messages:
                yield messages
            return
        spans = await self._tokenizer.spans(text, is_prompt=is_prompt)
        present = call.presenter
        yield deque([present.chat_tokenize(text, spans) if is_prompt else present.tokenize(spans)])
