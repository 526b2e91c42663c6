"""Lets calls in by the API key in `authorization`, before anything of a request is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..access.keys import ApiKeys
from ..errors import forbidden, unauthenticated
from ..routes import ADMIN_METHODS, SERVICE
from . import health, reflection
from .caller import EXTERNAL_ADDRESS, last_value

_SCHEME = "bearer "
_HEALTH = f"/{health.SERVICE_NAME}/"

# What can be exempted, with the methods that belong to it, or the services (these end in a slash).
EXEMPTIONS: dict[str, tuple[str, ...]] = {
    "health": (_HEALTH, f"/{SERVICE}/Health"),
    "metrics": (f"/{SERVICE}/Metrics",),
    "reflection": (f"/{reflection.V1}/", f"/{reflection.V1ALPHA}/"),
    "docs": (f"/{SERVICE}/Docs", f"/{SERVICE}/OpenApi"),
}


class Authenticator:
    """Knows the keys.

    Args:
        keys: those in force now; None lets everyone in.
        exempt: names of EXEMPTIONS, which need no key.
        admin_keys: those that let in everywhere, also to `ADMIN_METHODS`; None lets nobody in
            there.
    """

    def __init__(
        self,
        keys: Callable[[], ApiKeys] | None = None,
        exempt: Iterable[str] = (),
        admin_keys: Callable[[], ApiKeys] | None = None,
    ) -> None:
        self._keys = keys
        self._admin_keys = admin_keys
        self._open = {item for name in exempt for item in EXEMPTIONS.get(name, ())}

    @property
    def needs_keys(self) -> bool:
        """Whether callers need a key."""
        return self._keys is not None

    def names(self) -> Iterable[str]:
        """The names of the keys' owners that there are now."""
        files = [keys() for keys in (self._keys, self._admin_keys) if keys is not None]
        return sorted({name for file in files for name in file.names.values()})

    def admit(self, method: str, metadata: Any, *, from_gateway: bool) -> str | None:
        """Returns the name of the key's owner; None for a call that needs no key and has none.

        Args:
            method: the full name of what is called.
            metadata: the call's.
            from_gateway: whether it arrived at the gateway's address.

        Raises:
            ServiceError: the key is missing or wrong, or not enough.
        """
        key = _bearer(metadata)
        name = _owner(self._admin_keys, key)
        if method in ADMIN_METHODS:
            return self._admit_admin(name, key)
        if self._keys is None:
            return name
        name = name or _owner(self._keys, key)
        if name is None and not self._is_open(method, metadata, from_gateway):
            raise unauthenticated(is_missing=key is None)
        return name

    def _admit_admin(self, name: str | None, key: str | None) -> str:
        """The name of an admin key's owner.

        Raises:
            ServiceError: it is no admin key, or there are none.
        """
        if self._admin_keys is None:
            raise forbidden("this call needs a server that was started with --admin-key-file")
        if name is not None:
            return name
        if _owner(self._keys, key) is not None:
            raise forbidden("this call needs an admin key")
        raise unauthenticated(is_missing=key is None)

    def _is_open(self, method: str, metadata: Any, from_gateway: bool) -> bool:
        service = method[: method.rfind("/") + 1]
        if self._open & {method, service}:
            return True
        # Envoy asks for itself whether the service is well, and so does the supervisor. Callers'
        # calls never look like this: Envoy says in each of them where it comes from.
        is_own = from_gateway and last_value(metadata, EXTERNAL_ADDRESS) is None
        return is_own and service == _HEALTH


def _owner(keys: Callable[[], ApiKeys] | None, key: str | None) -> str | None:
    """Whose key it is; None if it is nobody's."""
    return None if keys is None or key is None else keys().name_of(key)


def _bearer(metadata: Any) -> str | None:
    """The key that a call has; None also for two, of which none could be meant."""
    values = [value for name, value in metadata or () if name == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return None
    scheme, key = values[0][: len(_SCHEME)], values[0][len(_SCHEME) :]
    return key.strip() if scheme.lower() == _SCHEME else None
