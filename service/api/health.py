"""grpc.health.v1: Check, Watch and List.

grpcio-health-checking's own servicer leaves List out, keeps a lock while it writes to a watcher, so
that one who reads nothing stops all changes, and lets watchers hold up the end of a server.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE_NAME: str = health.SERVICE_NAME

_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Statuses of services, which callers ask for or watch. Used from one event loop only."""

    def __init__(self) -> None:
        self._statuses: dict[str, Any] = {}
        self._changed = asyncio.Event()  # a new one after each change
        self._is_ending = False

    def set(self, service: str, status: Any) -> None:
        """Sets a service's status, as long as the server is not ending."""
        if not self._is_ending and self._statuses.get(service) != status:
            self._statuses[service] = status
            self._tell()

    def end(self) -> None:
        """No service is well any more, for good; watchers are told, and their calls end."""
        self._is_ending = True
        self._statuses = dict.fromkeys(self._statuses, _NOT_SERVING)
        self._tell()

    async def Check(self, request: Any, context: Any) -> Any:
        """The status of a service; NOT_FOUND for one that there is not."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> None:
        """The status of a service, whenever it is another one; UNAVAILABLE when the server ends."""
        last = None
        while True:
            changed, is_ending = self._changed, self._is_ending
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            if is_ending:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            await changed.wait()

    async def List(self, _: Any, __: Any) -> Any:
        """The status of every service."""
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._statuses.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
