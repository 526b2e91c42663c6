"""Long texts and conversations, which are tokenised and rendered in processes of their own.

A tokenizer's rules and a model's chat template are programs that come with the model: what they
take for a text that somebody made for it, nobody knows. So there is a deadline, and no other
request waits for it.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

from ..errors import ErrorKind, ServiceError, overloaded
from ..workers.budget import ByteBudget
from ..workers.courtesy import giving_way
from ..workers.crew import Crew
from ..workers.heap import Later, trim_if_grown
from ..workers.pause import pause
from ..workers.process import DeadError, LateError
from .escaping import EscapedText

# What is long. A tokenizer takes 60 ms for so many characters, without the interpreter's lock; a
# list of tokens needs the lock, and so does a template, for each message and for each byte.
LONG_CHARS = 128 * 1024  # of a text, and bytes of a conversation
LONG_LIST_CHARS = 16 * 1024  # of a text whose tokens are listed
LONG_MESSAGES = 256

_WORKER_BYTES = 4 * 1024**3  # address space of a process
MAX_LIST_BYTES = 60 * 1024**2  # of a list of tokens
_MAX_LISTED_BYTES = 4 * MAX_LIST_BYTES  # of all lists that their callers have not read yet

_SLICE = 32 * 1024  # tokens: a millisecond's work

# Who reads a list of tokens: REST callers or gRPC callers.
Form = Literal["rest", "typed"]


class TooManyTokensError(Exception):
    """A text has more tokens than may be."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens")
        self.count = count


class LongTexts:
    """The processes.

    Args:
        module: what they run.
        setup: the arguments with which they load the tokenizer.
        deadline_s: seconds that one text may take.
        max_bytes: of the texts that are in work or wait; more are refused.
        num_workers: number of processes.
    """

    def __init__(
        self,
        module: str,
        setup: list[Any],
        *,
        deadline_s: float,
        max_bytes: int,
        num_workers: int = 2,
    ) -> None:
        self._deadline_s = deadline_s
        self._budget = ByteBudget(max_bytes)
        self._lists = ByteBudget(_MAX_LISTED_BYTES)
        self._trimming = Later(trim_if_grown)
        self._crew = Crew(module, setup, max_bytes=_WORKER_BYTES, num_workers=num_workers)

    async def start(self) -> None:
        """Starts the processes, so that the first long text does not wait for it."""
        await self._crew.start()

    async def close(self) -> None:
        """Ends the processes."""
        self._trimming.cancel()
        await self._crew.close()

    async def encode(self, text: str, truncate: int | None, max_tokens: int) -> tuple[int, ...]:
        """Token ids, as `TextTokenizer.encode` gives them.

        Raises:
            TooManyTokensError: there are more than `max_tokens`.
            ServiceError: it takes too long or too much memory, or too much waits already.
        """
        answer = await self._ask(
            {"do": "encode", **_sent(text), "truncate": truncate, "max_tokens": max_tokens},
            len(text),
            "inputs",
        )
        if "count" in answer:
            raise TooManyTokensError(answer["count"])
        return await _token_ids(array("I", answer["ids"]))

    async def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        num_bytes: int,
    ) -> str:
        """The prompt for a conversation that came in so many bytes, as `render_chat` makes it.

        Raises:
            ServiceError: the template refuses it, or the same as for `encode`.
        """
        conversation = await asyncio.to_thread(_json, messages, tools, variables)
        answer = await self._ask(
            {"do": "render", "conversation": conversation}, num_bytes, "messages"
        )
        if "error" in answer:
            raise ServiceError(ErrorKind.TEMPLATE, answer["error"])
        return str(answer["prompt"])

    @asynccontextmanager
    async def tokens_listed(
        self, text: str, form: Form, *, is_prompt: bool, max_bytes: int = MAX_LIST_BYTES
    ) -> AsyncIterator[deque[bytes]]:
        """Messages that together list the tokens of a text or of a chat's prompt, ready to be sent.

        They are of some thousand tokens each, so that one long list does not hold up the event
        loop, a gateway or a connection. What of them is left takes memory to the end of the block.

        Args:
            text: whose tokens.
            form: that of the messages.
            is_prompt: whether a chat's template made the text.
            max_bytes: of all of them.

        Raises:
            ServiceError: there are more bytes, or the same as for `encode`.
        """
        field = "messages" if is_prompt else "inputs"
        limit = {"is_prompt": is_prompt, "max_bytes": max_bytes}
        parts, answer = await self._ask_for_parts(
            {"do": "list", **_sent(text), "form": form, **limit}, len(text), field
        )
        if "too_large" in answer:
            raise _invalid(
                field,
                f"has too many tokens: their list must have at most {max_bytes} bytes. "
                f"Given: {len(text)} characters",
            )
        messages = deque(parts)
        del parts
        try:
            with self._lists.hold(sum(map(len, messages))):
                yield messages
        finally:
            self._trimming.soon()

    async def _ask(self, request: dict[str, Any], num_bytes: int, field: str) -> Any:
        return (await self._ask_for_parts(request, num_bytes, field))[1]

    async def _ask_for_parts(
        self, request: dict[str, Any], num_bytes: int, field: str
    ) -> tuple[list[bytes], Any]:
        with self._budget.hold(num_bytes):
            parts, answer = await self._answer(request, field)
        if "no_memory" in answer:
            raise _invalid(field, "needs too much memory to tokenise")
        return parts, answer

    async def _answer(self, request: dict[str, Any], field: str) -> tuple[list[bytes], Any]:
        try:
            async with self._crew.worker() as worker:
                return await worker.ask_for_parts(request, self._deadline_s)
        except LateError as error:
            if error.is_starved:
                raise overloaded() from None
            reason = f"takes more than {self._deadline_s:g} s to tokenise"
            raise _invalid(field, reason) from None
        except DeadError:
            raise _invalid(field, "needs too much memory to tokenise") from None


async def _token_ids(values: array[int]) -> tuple[int, ...]:
    """A list of tokens as a tuple, made slice by slice: a long one takes milliseconds."""
    made: list[int] = []
    for start in range(0, len(values), _SLICE):
        made += values[start : start + _SLICE]
        await pause()
    return tuple(made)


def _json(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
) -> str:
    """A conversation as JSON, because its integers have any size.

    Message by message, and tool by tool, since each call holds the interpreter's lock.
    """
    listed = (_json_list(messages), "null" if tools is None else _json_list(tools))
    return "[" + ", ".join((*listed, json.dumps(variables, ensure_ascii=False))) + "]"


def _json_list(items: list[dict[str, Any]]) -> str:
    texts = (json.dumps(item, ensure_ascii=False) for item in giving_way(items))
    return "[" + ", ".join(texts) + "]"


def _sent(text: str) -> dict[str, Any]:
    """A text as a request has it, with the places of its special tokens if it says them."""
    special = text.special if isinstance(text, EscapedText) else None
    return {"text": str(text), "special": special}


def _invalid(field: str, reason: str) -> ServiceError:
    return ServiceError(ErrorKind.VALIDATION, f"`{field}` {reason}", field=field)
