"""Images among the parts of a message are told apart, each with its place in the request."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import ServiceError
from service.images.source import ImageSource
from service.openai.image_parts import sourced, sources

PATH = "messages[0].content"
URL = "https://images.example/x.png"
SHOWN = f"![]({URL})"
PART = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def at(place: str) -> ImageSource:
    return ImageSource(f"{PATH}{place}", URL)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (SHOWN, [at("")]),
        (f"A {SHOWN} B", [text("A "), at(""), text(" B")]),
        ([text("A"), PART], [text("A"), at("[1].image_url.url")]),
        ([text(f"A{SHOWN}"), PART], [text("A"), at("[0].text"), at("[1].image_url.url")]),
        ([at("[0].image")], [at("[0].image")]),
    ],
)
def test_images_are_parts_with_their_places(content: Any, parts: list[Any]) -> None:
    found = sourced(PATH, content, markdown=True)
    assert found == parts
    assert list(sources(found)) == [part for part in parts if isinstance(part, ImageSource)]


@pytest.mark.parametrize("content", [None, "A", "", 5, [5, text("A"), {"text": 5}], {"type": "x"}])
def test_anything_else_is_left_as_it_is(content: Any) -> None:
    assert sourced(PATH, content, markdown=True) == content
    assert list(sources(content)) == []


def test_markdown_is_text_where_it_is_not_read() -> None:
    for content in (SHOWN, [text(SHOWN)]):
        assert sourced(PATH, content, markdown=False) == content
    assert sourced(PATH, [PART], markdown=False) == [at("[0].image_url.url")]


@pytest.mark.parametrize("image", [None, {}, {"url": None}, {"url": 5}, "https://x"])
def test_a_part_without_a_url_is_refused(image: Any) -> None:
    with pytest.raises(ServiceError, match="missing field `url`") as caught:
        sourced(PATH, [text("A"), {"type": "image_url", "image_url": image}], markdown=False)
    assert caught.value.field == f"{PATH}[1].image_url.url"
