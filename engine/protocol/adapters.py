"""Adapters as a service and the engine speak of them: what is loaded, and what is to be."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

MAX_NAME = 256  # characters of an adapter's name, as answers repeat it
MAX_PATH_BYTES = 4096  # of a directory of one that is loaded while the engine runs


def same_name(name: str, served: str) -> bool:
    """Whether a caller's name is that of something served.

    A directory's leading slash may be missing: in a path it stands next to another one, and the
    gateway merges the two.
    """
    return bool(name) and name.removeprefix("/") == served.removeprefix("/")


def has_control_characters(name: str) -> bool:
    """Whether a name has some, which no adapter's may: it stands in headers and log lines."""
    return any(unicodedata.category(character) == "Cc" for character in name)


class AdapterInfo(NamedTuple):
    """An adapter that is loaded.

    `source` is where it was read from: a directory, or a hub id. `digest` is the sha-256 of its
    files in hex, by which requests choose it: a name may stand for other weights one day. `rank` is
    the largest of its updates.
    """

    name: str
    source: str
    digest: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapter:
    """An adapter to load while the engine runs.

    `source` is a path below the directory of `EngineConfig`, absolute or relative to it. With
    `replaces` one of the same name gives way. Unless `digest` is empty, files of any other digest
    are refused: it is an adapter that an engine had before it ended. `call` is who asks: one that
    is made again, since its service process ended, has the same.
    """

    name: str
    source: str
    replaces: bool = False
    digest: str = ""
    call: str = ""
