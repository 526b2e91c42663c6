"""An image of a request, as it came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image is: at a URL, or in the request itself.

    Attributes:
        field: where it stands in the request.
        url: `data:`, or where it is fetched from; empty if `data` is there.
        data: its file.
        mime_type: the format that the file is said to have; empty if nothing is said.
    """

    field: str
    url: str = ""
    data: bytes | None = None
    mime_type: str = ""
