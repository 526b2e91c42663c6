"""What a service needs of its engine, or of several with the same model, which are one to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol

from engine.protocol.adapters import AdapterInfo, LoadAdapter
from engine.protocol.config import EngineInfo
from engine.protocol.request import Request, SequenceOutput

from ..call_record import CallRecord


class Engines(Protocol):
    """One engine, or several."""

    @property
    def is_healthy(self) -> bool:
        """Whether an engine is connected and gets on."""

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """Those that there are, by name; replaced, never changed."""

    def start(self) -> None:
        """Begins to connect."""

    async def ready(self) -> EngineInfo:
        """Waits for the first engine and returns its description."""

    async def close(self) -> None:
        """Ends the connections; requests that still run fail."""

    def end_streams(self, reason: str) -> None:
        """Fails all requests that still run, and those that are still to come."""

    def new_request_id(self) -> str:
        """An id that no other request has."""

    def generate(
        self, request: Request, on_end: Callable[[], object] = lambda: None
    ) -> AsyncGenerator[SequenceOutput]:
        """Yields a request's output of each step until it ends. Closing the iterator aborts it.

        Raises:
            ServiceError: no engine is connected, the call was aborted, or the request has waited
                too long for its first step.
        """

    def abort(self, call: CallRecord) -> None:
        """Fails the requests of a call."""

    async def load_adapter(self, wanted: LoadAdapter) -> AdapterInfo | None:
        """Loads an adapter; afterwards it is one of `adapters`.

        Returns:
            The adapter; None if it was unloaded at once.

        Raises:
            AdapterError: it cannot be loaded.
            ServiceError: no engine is connected, or it ended.
        """

    async def unload_adapter(self, name: str, call: str = "") -> None:
        """Takes an adapter away, for a call; the requests that use it end first.

        Raises:
            AdapterError: there is none of this name.
            ServiceError: no engine is connected, or it ended.
        """
