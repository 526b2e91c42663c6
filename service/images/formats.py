"""The formats of images, told by how files begin."""

from __future__ import annotations

from .data_url import invalid
from .source import ImageSource

_BEGINNINGS = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/webp": b"RIFF",
    "image/gif": b"GIF8",
    "image/bmp": b"BM",
}


def check_format(source: ImageSource, data: bytes) -> None:
    """Checks that a file has the format that its sender says it has.

    Raises:
        ServiceError: it has not, or there is no such format.
    """
    if not source.mime_type:
        return
    beginning = _BEGINNINGS.get(source.mime_type.lower())
    if beginning is None:
        field = f"{source.field.rpartition('.')[0]}.mime_type"
        raise invalid(field, f"must be one of {', '.join(_BEGINNINGS)}")
    if not data.startswith(beginning):
        raise invalid(source.field, "is not in the format that its `mime_type` names")
