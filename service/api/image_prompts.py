"""Prompts with images: of texts that show them, and of conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from ..errors import ErrorKind, ServiceError
from ..generation.limits import Limits, check_count
from ..generation.parameters import Prompt
from ..generation.validation import marks_error
from ..images.images import Images
from ..images.markdown import MarkdownText
from ..images.pictured import PicturedText
from ..images.source import ImageSource
from ..openai.chat import Conversation
from ..text.escaping import EscapedText
from ..text.tokenizer import TextTokenizer


class ImagePrompts:
    """Puts images into prompts.

    Args:
        images: makes them ready; None for models that take none.
        tokenizer: the model's.
        limits: those in force.
    """

    def __init__(self, images: Images | None, tokenizer: TextTokenizer, limits: Limits) -> None:
        self._images = images
        self._tokenizer = tokenizer
        self._limits = limits

    async def of_text(self, inputs: Prompt, given: Sequence[ImageSource] = ()) -> Prompt:
        """A prompt with the images that its Markdown shows, if the model takes any.

        Args:
            inputs: the prompt.
            given: images that it shows by their numbers.

        Raises:
            ServiceError: an image cannot be used, or has no place.
        """
        if given and (self._images is None or not isinstance(inputs, str)):
            raise _no_place(is_text_model=self._images is None)
        if self._images is None or not isinstance(inputs, str):
            return inputs
        shown = MarkdownText.of(inputs, numbered=bool(given))
        check_count("inputs", len(shown.urls), self._limits.max_images, "images")
        sources = shown.sources(given)
        if not sources:
            return inputs
        pictures = await self._images.pictures(sources)
        mark = self._tokenizer.decode(pictures.token_ids)
        return PicturedText(mark.join(shown.texts), pictures, inputs)

    async def of_conversation(self, conversation: Conversation) -> Conversation:
        """A conversation whose prompt has its images.

        Raises:
            ServiceError: an image cannot be used.
        """
        sources = conversation.request.image_sources()
        if self._images is None or not sources:
            return conversation
        pictures = await self._images.pictures(sources)
        return replace(conversation, prompt=PicturedText(conversation.prompt, pictures))

    async def spelled(self, prompt: str) -> str:
        """A prompt in which tokens that stand for images are spelled, as the model gets them.

        Raises:
            ServiceError: there are not as many marks as images.
        """
        if not isinstance(prompt, PicturedText):
            return prompt
        return await asyncio.to_thread(self._spelled, prompt)

    def _spelled(self, prompt: PicturedText) -> EscapedText:
        text, tokens = prompt.text, self._tokenizer.special_tokens
        mark = self._tokenizer.decode([prompt.pictures.mark])
        places = text.special if isinstance(text, EscapedText) else tokens.places(text)
        found = [text[start:stop] for start, stop in places]
        try:
            prompt.pictures.check(found.count(mark))
        except ValueError as error:
            raise marks_error(error) from None
        images = (self._tokenizer.decode(picture.token_ids) for picture in prompt.pictures.all)
        parts, special, at, length = list[str](), list[tuple[int, int]](), 0, 0
        for (start, stop), token in zip(places, found, strict=True):
            spelling = next(images) if token == mark else token
            length += start - at
            special += [(length + a, length + b) for a, b in tokens.places(spelling)]
            parts += [text[at:start], spelling]
            length, at = length + len(spelling), stop
        return EscapedText("".join(parts) + text[at:], special)


def _no_place(*, is_text_model: bool) -> ServiceError:
    text = "the model takes text only; images are not supported"
    if not is_text_model:
        text = "`images` are shown in `inputs`, and not among `input_ids`"
    return ServiceError(ErrorKind.VALIDATION, text, field="images")
