"""Loads and unloads adapters while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.protocol.adapters import AdapterInfo, LoadAdapter
from engine.protocol.errors import AdapterError, AdapterFault

from ..errors import ErrorKind, ServiceError
from .adapters import Adapters
from .engines import Engines
from .limits import check_adapter_name, check_adapter_path

# The kind of error, and the field at fault.
_ERRORS: dict[AdapterFault, tuple[ErrorKind, str | None]] = {
    AdapterFault.INVALID: (ErrorKind.ADAPTER, "lora_path"),
    AdapterFault.MISSING: (ErrorKind.NOT_FOUND, "lora_path"),
    AdapterFault.FORBIDDEN: (ErrorKind.FORBIDDEN, "lora_path"),
    AdapterFault.LOADED: (ErrorKind.ADAPTER_LOADED, "lora_name"),
    AdapterFault.UNKNOWN: (ErrorKind.NOT_FOUND, "lora_name"),
    AdapterFault.TOO_MANY: (ErrorKind.TOO_MANY_ADAPTERS, None),
}


class AdapterChanges:
    """Changes which adapters there are.

    Args:
        client: of the engine, which reads them.
        adapters: those that there are.
    """

    def __init__(self, client: Engines, adapters: Adapters) -> None:
        self._client = client
        self._adapters = adapters

    async def load(self, wanted: LoadAdapter) -> AdapterInfo:
        """Loads an adapter.

        Raises:
            ServiceError: it cannot be loaded.
        """
        check_adapter_name(wanted.name, is_base=self._adapters.is_base(wanted.name))
        check_adapter_path(wanted.source)
        with _translated():
            loaded = await self._client.load_adapter(wanted)
        if loaded is None:
            text = f"The adapter `{wanted.name}` was unloaded meanwhile"
            raise ServiceError(ErrorKind.NOT_FOUND, text, field="lora_name")
        return loaded

    async def unload(self, name: str, call: str = "") -> None:
        """Takes an adapter away, for a call.

        Raises:
            ServiceError: there is none of this name, or it is no name.
        """
        check_adapter_name(name, is_base=self._adapters.is_base(name))
        with _translated():
            await self._client.unload_adapter(name, call)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        kind, field = _ERRORS[error.fault]
        raise ServiceError(kind, str(error), field=field) from error
