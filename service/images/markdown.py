"""Images in Markdown within a plain prompt, which is how TGI's callers of `/generate` send them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .data_url import invalid
from .source import ImageSource

# TGI 2.1.2-dev0 takes these as images and all other Markdown as text. No parenthesis within a URL:
# a text of many beginnings would be read to its end for each.
_IMAGE = re.compile(r"!\[\]\(((?:data:|https?://)[^()\s]*)\)")
# The same, and images that came beside the prompt, by their numbers.
_NUMBERED = re.compile(r"!\[\]\(((?:data:|https?://|image:(?=\d{1,4}\)))[^()\s]*)\)")
_NUMBER = "image:"


@dataclass(frozen=True, slots=True)
class MarkdownText:
    """A prompt taken apart.

    Attributes:
        texts: around the images: one more than there are.
        urls: of the images.
    """

    texts: tuple[str, ...]
    urls: tuple[str, ...]

    @classmethod
    def of(cls, inputs: str, *, numbered: bool = False) -> MarkdownText:
        """Finds the images of a prompt; `numbered`: also those written as `image:0`."""
        parts = (_NUMBERED if numbered else _IMAGE).split(inputs)
        return cls(tuple(parts[::2]), tuple(parts[1::2]))

    def sources(self, images: Sequence[ImageSource]) -> list[ImageSource]:
        """Where the images are; `image:0` is the first of `images`.

        Raises:
            ServiceError: there is none of a number, or an image is not in the prompt.
        """
        found = [_source(url, images) for url in self.urls]
        for image in images:
            if image not in found:
                raise invalid(image.field, "is not shown in `inputs`")
        return found


def _source(url: str, images: Sequence[ImageSource]) -> ImageSource:
    if not url.startswith(_NUMBER):
        return ImageSource("inputs", url)
    number = int(url.removeprefix(_NUMBER))
    if number >= len(images):
        raise invalid("inputs", f"shows an image that is not there. Given: {url}")
    return images[number]
