"""Reads images from `data:` URLs."""

from __future__ import annotations

import binascii
from base64 import b64decode

from ..errors import ErrorKind, ServiceError

_SCHEME = "data:"
_ENCODING = ";base64"


def is_data_url(url: str) -> bool:
    """Whether the URL is itself the file."""
    return url[: len(_SCHEME)].lower() == _SCHEME


def image_bytes(url: str, field: str) -> bytes:
    """The bytes of an image.

    Args:
        url: of the form `data:image/png;base64,…`.
        field: where it stands in the request.

    Raises:
        ServiceError: it is of another form.
    """
    head, comma, data = url.partition(",")
    if not is_data_url(url):
        raise invalid(field, "must be a data: URL; this server fetches no images")
    if not comma or not head.lower().endswith(_ENCODING):
        raise invalid(field, "must have the form data:image/png;base64,…")
    try:
        return b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(field, "has data that is not base64") from None


def invalid(field: str, reason: str) -> ServiceError:
    """The error of an image that cannot be used."""
    return ServiceError(ErrorKind.VALIDATION, f"`{field}` {reason}", field=field)
