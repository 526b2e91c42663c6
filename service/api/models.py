"""The model that is served, and the adapters beside it, which admins load and unload."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import unquote

from engine.protocol.adapters import LoadAdapter

from ..codec.presenter import Reply
from ..errors import unknown_model
from ..generation.adapter_changes import AdapterChanges
from ..generation.server_info import ServerInfo
from .call import Call


class Models:
    """Tells callers what they can ask for.

    Args:
        server: what is served.
        changes: of its adapters.
    """

    def __init__(self, server: ServerInfo, changes: AdapterChanges) -> None:
        self._server = server
        self._changes = changes

    def find(self, model_id: str, call: Call) -> Reply:
        """The model or adapter of this name.

        Raises:
            ServiceError: there is none.
        """
        # Clients write the slashes of a name in a path as %2F, and Envoy leaves them so.
        name = unquote(model_id) if call.is_rest else model_id
        found = self._server.find_model(name)
        if found is None:
            raise unknown_model(name)
        return call.presenter.get_model(self._server, found)

    async def load_adapter(self, wanted: LoadAdapter, call: Call) -> Reply:
        """Loads an adapter.

        Raises:
            ServiceError: it cannot be loaded.
        """
        wanted = replace(wanted, call=call.gateway_id)
        return call.presenter.adapter_loaded(await self._changes.load(wanted))

    async def unload_adapter(self, name: str, call: Call) -> Reply:
        """Takes an adapter away.

        Raises:
            ServiceError: there is none of this name.
        """
        await self._changes.unload(name, call.gateway_id)
        return call.presenter.adapter_unloaded(name)
