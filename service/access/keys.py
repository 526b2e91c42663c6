"""API keys: how they are made, how a file names their owners, and whose key a caller has.

The file has the keys' SHA-256 hashes, so that nobody who reads it can use them. A fast hash is
enough: a key has 256 random bits, which no one can guess, unlike a password. A slow one would give
callers without a key a way to use up processor time.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .watched import Watched

_MAX_FILE_BYTES = 1 << 20
_NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
_LINE = re.compile(rf"({_NAME})\s+sha256:([0-9a-f]{{64}})")


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The names of the keys' owners, by the keys' digests. One name may have several keys."""

    names: Mapping[bytes, str]

    def name_of(self, key: str) -> str | None:
        """Whose key this is, if it is one; the time taken does not tell how much of it is right."""
        given, found = _digest(key), None
        for digest, name in self.names.items():
            if hmac.compare_digest(digest, given):
                found = name
        return found


def watch_keys(path: Path, kept: Path | None = None) -> Watched[ApiKeys]:
    """The keys of a file, as long as the server runs.

    Args:
        path: the file.
        kept: where the keys in force are kept for the next process in place of this one, which may
            find the file broken; in a directory of our own user's.

    Raises:
        OSError, ValueError: see `read_keys`.
    """

    def read() -> ApiKeys:
        keys = read_keys(path)
        if kept is not None:
            _keep(kept, keys)
        return keys

    is_kept = kept is not None and kept.exists()
    read_kept = partial(read_keys, kept) if kept is not None and is_kept else None
    return Watched("the API keys", (path,), read, read_kept)


def _keep(path: Path, keys: ApiKeys) -> None:
    """Writes the keys' hashes; several processes may at once."""
    lines = (_line(name, digest) for digest, name in keys.names.items())
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text("".join(f"{line}\n" for line in lines))
    fresh.replace(path)


def read_keys(path: Path) -> ApiKeys:
    """Reads a file of keys.

    Raises:
        OSError: it cannot be read; the text is one line.
        ValueError: it is no such file, or has no key.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise ValueError(f"{path}: more than {_MAX_FILE_BYTES} bytes")
    try:
        return parse_keys(raw.decode())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_keys(text: str) -> ApiKeys:
    """Reads lines like `alice sha256:9f86…`; empty ones and those that begin with # are skipped.

    Raises:
        ValueError: a line is something else. The text does not repeat it: it might be a key.
    """
    names: dict[bytes, str] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not a name and sha256:… as `tokenwire key` prints")
        digest = bytes.fromhex(match[2])
        if names.setdefault(digest, match[1]) != match[1]:
            raise ValueError(f"line {number} has the key of another name")
    if not names:
        raise ValueError("there is no key in it")
    return ApiKeys(names)


def make_key() -> str:
    """Makes a key of 256 random bits."""
    return "tw-" + secrets.token_urlsafe(32)


def key_line(name: str, key: str) -> str:
    """The line of a file that lets a key in.

    Raises:
        ValueError: the name cannot be used.
    """
    if re.fullmatch(_NAME, name) is None:
        raise ValueError(
            "a name must have 1 to 64 letters, digits or . _ @ - and begin with a letter or digit. "
            f"Given: {name}"
        )
    return _line(name, _digest(key))


def _line(name: str, digest: bytes) -> str:
    return f"{name} sha256:{digest.hex()}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
