"""A file is of the format that its sender names."""

from __future__ import annotations

import pytest

from service.errors import ServiceError
from service.images.formats import check_format
from service.images.source import ImageSource

pytest.importorskip("PIL")

from io import BytesIO

from PIL import Image

FORMATS = ("png", "jpeg", "webp", "gif", "bmp")


def file(name: str) -> bytes:
    made = BytesIO()
    Image.new("RGB", (2, 2)).save(made, name.upper())
    return made.getvalue()


def said(mime_type: str) -> ImageSource:
    return ImageSource("images[0].data", data=b"", mime_type=mime_type)


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_of_one_format(name: str) -> None:
    for other in FORMATS:
        if other == name:
            check_format(said(f"image/{name}"), file(name))
            check_format(said(f"IMAGE/{name.upper()}"), file(name))
        else:
            with pytest.raises(ServiceError, match="is not in the format"):
                check_format(said(f"image/{other}"), file(name))
    check_format(said(""), file(name))


@pytest.mark.parametrize("mime_type", ["image/svg+xml", "png", "text/plain", "image/"])
def test_other_formats_are_refused(mime_type: str) -> None:
    with pytest.raises(ServiceError, match="must be one of image/png") as caught:
        check_format(said(mime_type), file("png"))
    assert caught.value.field == "images[0].mime_type"
