"""Which Markdown in a prompt is an image, and that a prompt of any form is read once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ServiceError
from service.images.markdown import MarkdownText
from service.images.source import ImageSource

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


def test_images_beside_a_prompt_are_shown_by_number() -> None:
    images = [ImageSource(f"images[{number}].data", data=b"x") for number in range(2)]
    inputs = f"![](image:1)![]({PNG})![](image:0)![](image:1)![](image:x)"
    found = MarkdownText.of(inputs, numbered=True)
    assert found.texts == ("", "", "", "", "![](image:x)")
    first, second = images
    assert found.sources(images) == [second, ImageSource("inputs", PNG), first, second]
    assert MarkdownText.of(inputs).urls == (PNG,)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [("![](image:0)", "images[1]"), ("![](image:2)", "inputs"), ("x", "images[0]")],
)
def test_each_number_has_an_image_and_each_image_a_number(inputs: str, field: str) -> None:
    images = [ImageSource(f"images[{number}]", data=b"x") for number in range(2)]
    with pytest.raises(ServiceError) as caught:
        MarkdownText.of(inputs, numbered=True).sources(images)
    assert caught.value.field == field


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
