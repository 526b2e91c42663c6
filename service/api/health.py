"""grpc.health.v1 with the method that grpcio-health-checking leaves out on asyncio."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health, health_pb2

SERVICE_NAME: str = health.SERVICE_NAME


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """Check, Watch and List."""

    async def List(self, _: Any, __: Any) -> Any:
        """The status of every service."""
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._server_status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)
