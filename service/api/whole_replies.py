"""Replies that have whole texts: small ones are made at once, long ones beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from ..codec.presenter import Reply
from ..generation.generation import Generation
from ..workers.heap import Later, trim_if_grown

_T = TypeVar("_T")
_SMALL = 512  # tokens, which take a millisecond; those at the same place in a text count, too


class WholeReplies:
    """Makes replies, long ones in a thread: one after the other, as all need the same lock."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "replies")
        self._trimming = Later(trim_if_grown)

    async def made(self, results: Sequence[Generation], make: Callable[[], Reply]) -> Reply:
        """A reply that is made of generations, the last one; a message as its bytes."""

        def make_last() -> Reply:
            reply = bytes(make())
            for result in results:
                result.release()
            return reply

        return await self.run(results, make_last)

    async def run(self, results: Sequence[Generation], function: Callable[[], _T]) -> _T:
        """Calls a function that reads generations."""
        if sum(map(_num_tokens, results)) <= _SMALL:
            return function()
        run = copy_context().run  # for the call's id
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run, function)
        finally:
            self._trimming.soon()


def _num_tokens(result: Generation) -> int:
    """How many tokens may be told of."""
    width = 1 + (result.request.sampling.top_n_tokens if result.top_tokens else 0)
    own = len(result.prefill) + width * len(result.tokens)
    return own + sum(map(_num_tokens, result.best_of_sequences))
