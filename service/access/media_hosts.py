"""The hosts that images may be fetched from, as the operator lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PORTS = (80, 443)  # of an entry without one
_MAX_PORT = 65535
_ENTRY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([0-9a-z_](?:[0-9a-z_.-]*[0-9a-z_])?))(?::(\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class MediaHosts:
    """Hosts with their ports.

    Attributes:
        places: name or address in lower case, IPv6 without brackets, and port.
    """

    places: frozenset[tuple[str, int]]

    @classmethod
    def of(cls, entries: Iterable[str]) -> MediaHosts:
        """Reads entries such as `example.com`, `example.com:8443`, `10.0.0.7` or `[fd00::7]:80`.

        Raises:
            ValueError: one has another form.
        """
        return cls(frozenset(place for entry in entries for place in _places(entry)))

    def __contains__(self, place: tuple[str, int]) -> bool:
        return place in self.places


def _places(entry: str) -> list[tuple[str, int]]:
    found = _ENTRY.fullmatch(entry.lower())
    if found is None or not 0 < int(found[3] or 1) <= _MAX_PORT:
        raise ValueError(
            f"an entry must have the form example.com, example.com:8443 or [::1]:80. Given: {entry}"
        )
    ports = (int(found[3]),) if found[3] else _PORTS
    return [(found[1] or found[2], port) for port in ports]
