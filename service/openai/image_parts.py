"""Images among the parts of a message: `image_url` parts, and Markdown in what users say.

content as received --sourced--> the same with an ImageSource for each image
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import missing_field
from ..images.markdown import MarkdownText
from ..images.source import ImageSource

IMAGE = "image_url"


def sourced(path: str, content: Any, *, markdown: bool) -> Any:
    """A message's content with its images told apart from its texts.

    Args:
        path: of the content in the request.
        content: a text, a list of parts, or anything that a caller has sent.
        markdown: whether Markdown in texts may be images.

    Raises:
        ServiceError: a part for an image has no URL.
    """
    if isinstance(content, str):
        return (_split(path, content) if markdown else None) or content
    if not isinstance(content, list):
        return content
    places = ((f"{path}[{number}]", part) for number, part in enumerate(content))
    return [one for place, part in places for one in _sourced_part(place, part, markdown)]


def sources(content: Any) -> Iterator[ImageSource]:
    """The images of a content that `sourced` has made."""
    parts = content if isinstance(content, list) else []
    return (part for part in parts if isinstance(part, ImageSource))


def _sourced_part(path: str, part: Any, markdown: bool) -> list[Any]:
    if not isinstance(part, dict):
        return [part]
    if part.get("type") == IMAGE:
        return [ImageSource(f"{path}.{IMAGE}.url", _url(path, part))]
    text = part.get("text")
    if not markdown or not isinstance(text, str):
        return [part]
    return _split(f"{path}.text", text) or [part]


def _url(path: str, part: dict[str, Any]) -> str:
    image = part.get(IMAGE)
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str):
        raise missing_field(f"{path}.{IMAGE}.url")
    return url


def _split(path: str, text: str) -> list[Any]:
    """The parts of a text that has images in Markdown; none if it has not."""
    found = MarkdownText.of(text)
    if not found.urls:
        return []
    images = [ImageSource(path, url) for url in found.urls]
    texts = [{"type": "text", "text": text} if text else None for text in found.texts]
    pairs = zip(texts, [*images, None], strict=True)
    return [part for pair in pairs for part in pair if part is not None]
