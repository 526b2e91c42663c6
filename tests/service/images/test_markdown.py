"""Which Markdown in a prompt is an image, and that a prompt of any form is read once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.images.markdown import MarkdownText

PNG = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    ("inputs", "texts", "urls"),
    [
        (f"![]({PNG})What is this?", ("", "What is this?"), (PNG,)),
        (f"a ![]({PNG})![](http://a.b/c.png) d", ("a ", "", " d"), (PNG, "http://a.b/c.png")),
        (f"![a title]({PNG})", (f"![a title]({PNG})",), ()),
        ("![](picture.png)", ("![](picture.png)",), ()),
        (f"![]({PNG}", (f"![]({PNG}",), ()),
        ("", ("",), ()),
    ],
)
def test_images_are_those_with_an_empty_title_and_a_url(
    inputs: str, texts: tuple[str, ...], urls: tuple[str, ...]
) -> None:
    assert MarkdownText.of(inputs) == MarkdownText(texts, urls)


@given(st.lists(st.text(alphabet="![]()dat:x", max_size=12)), st.integers(0, 3))
def test_texts_and_images_are_the_whole_prompt(parts: list[str], count: int) -> None:
    inputs = f"![]({PNG})".join(parts[: count + 1])
    found = MarkdownText.of(inputs)
    assert len(found.texts) == len(found.urls) + 1
    images = [*(f"![]({url})" for url in found.urls), ""]
    assert "".join(t + i for t, i in zip(found.texts, images, strict=True)) == inputs


def test_many_beginnings_without_an_end_are_text() -> None:
    inputs = "![](data:" * 200_000
    assert MarkdownText.of(inputs).urls == ()
