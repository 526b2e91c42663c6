"""A prompt's tokens with those of its images in the place of their marks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.protocol.images import Image
from service.images.pictured import Picture, PicturedText, Pictures
from service.text.escaping import EscapedText

MARK = 9


def picture(*token_ids: int, spans: tuple[tuple[int, int], ...]) -> Picture:
    return Picture(token_ids, Image(bytes(token_ids), spans, ()))


FIRST = picture(7, 8, 8, 7, spans=((1, 2),))
SECOND = picture(8, 6, 8, spans=((0, 1), (2, 1)))
BOTH = Pictures((FIRST, SECOND), MARK, (MARK,), "<mark>")


def test_marks_become_the_images_tokens() -> None:
    text = PicturedText("a prompt", BOTH)
    token_ids, images = text.expanded((1, MARK, 2, 3, MARK))
    assert token_ids == (1, 7, 8, 8, 7, 2, 3, 8, 6, 8)
    assert [image.spans for image in images] == [((2, 2),), ((7, 1), (9, 1))]
    assert all(token_ids[at] == 8 for image in images for at, _ in image.spans)


@pytest.mark.parametrize("token_ids", [(1, 2), (MARK, MARK, MARK)])
def test_marks_must_be_as_many_as_images(token_ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="marks for 2 images"):
        PicturedText("a prompt", BOTH).expanded(token_ids)


def test_texts_stand_around_marks_and_not_around_their_spellings() -> None:
    framed = Pictures(
        (replace(FIRST, before="\n", after="!"), replace(SECOND, before="\n", after="?")),
        MARK,
        (MARK,),
        "<mark>",
    )
    prompt = "<s>a <mark><mark>b <mark> c</s>"
    assert PicturedText(prompt, framed).text == prompt  # three marks, two images
    special = [(0, 3), (5, 11), (19, 25), (27, 31)]
    text = PicturedText(EscapedText(prompt, special), framed).text
    assert text == "<s>a \n<mark>!<mark>b \n<mark>? c</s>"
    assert isinstance(text, EscapedText)
    spelled = [text[start:end] for start, end in text.special]
    assert spelled == ["<s>", "<mark>", "<mark>", "</s>"]
    assert [start for start, _ in text.special] == [0, 6, 22, 31]
    assert PicturedText("<mark><mark>", framed).text == "\n<mark>!\n<mark>?"
