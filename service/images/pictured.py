"""A prompt whose text has images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.protocol.images import Image


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that is ready for the model.

    Attributes:
        token_ids: what stands in a prompt in place of its mark.
        image: for the engine; positions count from the first of these tokens.
    """

    token_ids: tuple[int, ...]
    image: Image


class PicturedText(str):
    """A prompt as a template wrote it, with a mark for each image.

    Attributes:
        text: the same, as the tokenizer wants it.
        pictures: the images, in the order of their marks.
        mark: the token that a template writes for an image.
    """

    __slots__ = ("mark", "pictures", "text")

    text: str
    pictures: tuple[Picture, ...]
    mark: int

    def __new__(cls, text: str, pictures: tuple[Picture, ...], mark: int) -> PicturedText:
        """A prompt, its images, and the token that stands for one."""
        made = super().__new__(cls, text)
        made.text, made.pictures, made.mark = text, pictures, mark
        return made

    def expanded(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Image, ...]]:
        """The prompt's tokens with those of its images, and the images at their places.

        Raises:
            ValueError: there are not as many marks as images.
        """
        if token_ids.count(self.mark) != len(self.pictures):
            raise ValueError(f"{token_ids.count(self.mark)} marks for {len(self.pictures)} images")
        ids: list[int] = []
        images = []
        left = iter(self.pictures)
        for token_id in token_ids:
            if token_id != self.mark:
                ids.append(token_id)
                continue
            picture = next(left)
            spans = tuple((len(ids) + start, length) for start, length in picture.image.spans)
            images.append(replace(picture.image, spans=spans))
            ids += picture.token_ids
        return tuple(ids), tuple(images)
