"""Images in Markdown within a plain prompt, which is how TGI's callers of `/generate` send them."""

from __future__ import annotations

import re
from dataclasses import dataclass

# TGI 2.1.2-dev0 takes these as images and all other Markdown as text. No parenthesis within a URL:
# a text of many beginnings would be read to its end for each.
_IMAGE = re.compile(r"!\[\]\(((?:data:|https?://)[^()\s]*)\)")


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
    def of(cls, inputs: str) -> MarkdownText:
        """Finds the images of a prompt."""
        parts = _IMAGE.split(inputs)
        return cls(tuple(parts[::2]), tuple(parts[1::2]))
