"""Texts that are to be continued, in TGI's own terms."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial

from ..codec.presenter import Reply
from ..generation.parameters import TextRequest
from .call import Call
from .generations import Generations
from .image_prompts import ImagePrompts
from .replies import alone
from .whole_replies import WholeReplies


class Texts:
    """Continues texts.

    Args:
        generations: of the calls.
        images: of prompts.
        replies: that are whole.
    """

    def __init__(
        self, generations: Generations, images: ImagePrompts, replies: WholeReplies
    ) -> None:
        self._generations = generations
        self._images = images
        self._replies = replies

    async def generate(self, request: TextRequest, call: Call) -> Reply:
        """Generates a whole text."""
        inputs = await self._images.of_text(request.inputs, request.images)
        result = await self._generations.run(inputs, request.parameters, call)
        return await self._replies.made([result], partial(call.presenter.generate, result))

    async def generate_stream(self, request: TextRequest, call: Call) -> AsyncGenerator[Reply]:
        """Generates a text as one message per token."""
        self._generations.check_stream(request.parameters)
        inputs = await self._images.of_text(request.inputs, request.images)
        events = self._generations.stream(inputs, request.parameters, call)
        return self._generations.presented(events, [inputs], call, call.presenter.generate_stream)

    async def compat_generate(self, request: TextRequest, call: Call) -> AsyncGenerator[Reply]:
        """Generate or GenerateStream; by default the text includes the prompt."""
        inputs = await self._images.of_text(request.inputs, request.images)
        parameters = request.parameters
        if parameters.return_full_text is None:
            parameters = replace(parameters, return_full_text=True)
        if not request.stream:
            result = await self._generations.run(inputs, parameters, call)
            present = partial(call.presenter.compat_generate, result)
            return alone(await self._replies.made([result], present))
        self._generations.check_stream(parameters)
        events = self._generations.stream(inputs, parameters, call)
        return self._generations.presented(
            events, [inputs], call, call.presenter.compat_generate_stream
        )
