"""A prompt whose text has images."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from engine.protocol.images import Image

from ..text.escaping import EscapedText


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that is ready for the model.

    Attributes:
        token_ids: what stands in a prompt in place of its mark.
        image: for the engine; positions count from the first of these tokens.
        before: text that stands before its mark, and is tokenised with the prompt.
        after: likewise, behind it.
    """

    token_ids: tuple[int, ...]
    image: Image
    before: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of a prompt.

    Attributes:
        all: in the order of the prompt.
        mark: the token that is replaced by those of an image.
        token_ids: what a template writes for an image: the mark, and tokens around it.
        mark_text: how a prompt spells the mark.
    """

    all: tuple[Picture, ...]
    mark: int
    token_ids: tuple[int, ...]
    mark_text: str

    def within(self, prompt: str) -> str:
        """A prompt with the texts that stand around its marks."""
        if not any(picture.before or picture.after for picture in self.all):
            return prompt
        places = _places(prompt, self.mark_text)
        if len(places) != len(self.all):
            return prompt  # which is refused once its marks are counted
        inserted = []
        for place, picture in zip(places, self.all, strict=True):
            inserted += [(place, picture.before), (place + len(self.mark_text), picture.after)]
        return _with_texts(prompt, inserted)

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
        made.text, made.pictures = pictures.within(text), pictures
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


def _places(prompt: str, mark: str) -> list[int]:
    """Where a prompt has marks; one that a caller has spelled is text."""
    found = [match.start() for match in re.finditer(re.escape(mark), prompt)]
    if isinstance(prompt, EscapedText):
        meant = {start for start, _ in prompt.special}
        found = [place for place in found if place in meant]
    return found


def _with_texts(prompt: str, inserted: list[tuple[int, str]]) -> str:
    """A prompt with texts at some places, from left to right."""
    parts, at = [], 0
    for place, text in inserted:
        parts += [prompt[at:place], text]
        at = place
    whole = "".join([*parts, prompt[at:]])
    if not isinstance(prompt, EscapedText):
        return whole
    return EscapedText(
        whole, ((s + _moved(s, inserted), e + _moved(s, inserted)) for s, e in prompt.special)
    )


def _moved(index: int, inserted: list[tuple[int, str]]) -> int:
    """By how much the character with this index moves."""
    return sum(len(text) for place, text in inserted if place <= index)
