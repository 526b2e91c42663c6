"""Typed images of gRPC callers, which need no base64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ErrorKind, ServiceError, missing_field
from ..images.source import ImageSource
from ..pb.tokenwire import v1 as pb


def images_of(wire: Sequence[pb.Image]) -> tuple[ImageSource, ...]:
    """The images of a prompt.

    Raises:
        ServiceError: one is empty.
    """
    return tuple(_source(f"images[{index}]", image) for index, image in enumerate(wire))


def parts_of(path: str, wire: Sequence[pb.ContentPart]) -> list[dict[str, Any] | ImageSource]:
    """The parts of a message.

    Raises:
        ServiceError: one is empty.
    """
    return [_part(f"{path}[{index}]", part) for index, part in enumerate(wire)]


def _part(path: str, wire: pb.ContentPart) -> dict[str, Any] | ImageSource:
    if wire.text is not None:
        return {"type": "text", "text": wire.text}
    if wire.image is not None:
        return _source(f"{path}.image", wire.image)
    raise missing_field(f"{path}.text")


def _source(path: str, wire: pb.Image) -> ImageSource:
    """Where an image is.

    Raises:
        ServiceError: nowhere, or a format is given for what is no file.
    """
    if wire.data is not None:
        return ImageSource(f"{path}.data", data=wire.data, mime_type=wire.mime_type or "")
    if wire.url is None:
        raise missing_field(f"{path}.data")
    if wire.mime_type is not None:
        text = f"`{path}.mime_type` is for `data` only"
        raise ServiceError(ErrorKind.VALIDATION, text, field=f"{path}.mime_type")
    return ImageSource(f"{path}.url", wire.url)
