"""Images in data: URLs."""

from __future__ import annotations

import pytest

from service.errors import ServiceError
from service.images.data_url import image_bytes

FIELD = "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:;BASE64,", "data:x;y=1;base64,"])
def test_base64_is_read(head: str) -> None:
    assert image_bytes(head + "aGVsbG8=", FIELD) == b"hello"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.com/x.png", "fetches no images"),
        ("file:///etc/passwd", "fetches no images"),
        ("", "fetches no images"),
        ("data:image/png,abc", "must have the form"),
        ("data:image/png;base64", "must have the form"),
        ("data:image/png;base64,a", "not base64"),
        ("data:image/png;base64,aGVs\nbG8=", "not base64"),
        ("data:image/png;base64,é", "not base64"),
    ],
)
def test_anything_else_is_refused(url: str, said: str) -> None:
    with pytest.raises(ServiceError, match=said) as caught:
        image_bytes(url, FIELD)
    assert caught.value.field == FIELD
