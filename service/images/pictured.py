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


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of a prompt.

    Attributes:
        all: in the order of the prompt.
        mark: the token that is replaced by those of an image.
        token_ids: what a template writes for an image: the mark, and tokens around it.
    """

    all: tuple[Picture, ...]
    mark: int
    token_ids: tuple[int, ...]

    def check(self, num_marks: int) -> None:
        """Checks how many marks a prompt has.

        Raises:
            ValueError: not as many as images.
        """
        if num_marks != len(self.all):
            raise ValueError(f"{num_marks} marks for {len(self.all)} images")


class PicturedText(str):
    """A prompt as a caller sees it, with images.

    Attributes:
        text: what is tokenised: it has a mark for each image.
        pictures: the images, in the order of their marks.
    """

    __slots__ = ("pictures", "text")

    text: str
    pictures: Pictures

    def __new__(cls, text: str, pictures: Pictures, shown: str | None = None) -> PicturedText:
        """A prompt with marks, its images, and what a caller sees of it if that is another text."""
        made = super().__new__(cls, text if shown is None else shown)
        made.text, made.pictures = text, pictures
        return made

    def expanded(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Image, ...]]:
        """The prompt's tokens with those of its images, and the images at their places.

        Raises:
            ValueError: there are not as many marks as images.
        """
        mark, pictures = self.pictures.mark, self.pictures.all
        self.pictures.check(token_ids.count(mark))
        ids: list[int] = []
        images = []
        left = iter(pictures)
        for token_id in token_ids:
            if token_id != mark:
                ids.append(token_id)
                continue
            picture = next(left)
            spans = tuple((len(ids) + start, length) for start, length in picture.image.spans)
            images.append(replace(picture.image, spans=spans))
            ids += picture.token_ids
        return tuple(ids), tuple(images)
