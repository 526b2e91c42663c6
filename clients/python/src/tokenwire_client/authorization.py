"""What every call carries: the caller's metadata, and its API key."""

from __future__ import annotations

from collections.abc import Mapping


def call_metadata(
    metadata: Mapping[str, str] | None, api_key: str | None
) -> tuple[tuple[str, str], ...]:
    """Metadata with the key in it.

    Raises:
        ValueError: the metadata has an authorization of its own.
    """
    given = dict(metadata or {})
    if api_key is None:
        return tuple(given.items())
    if any(name.lower() == "authorization" for name in given):
        raise ValueError("give the key as `api_key` or in `metadata`, not both")
    return (*given.items(), ("authorization", f"Bearer {api_key}"))
