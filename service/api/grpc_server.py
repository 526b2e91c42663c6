"""The server of grpc.aio under the handlers: its options, its interceptor, its addresses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from grpc import aio

from ..generation.metrics import Metrics
from ..launch.edge import MAX_METADATA_BYTES, MAX_REPLY_BYTES
from ..launch.settings import Settings
from .authentication import Authenticator
from .calls_in_progress import CallsInProgress
from .interceptor import CallInterceptor

if TYPE_CHECKING:  # else OpenTelemetry would be imported where there are no traces
    from ..tracing.tracer import CallTracer

_KEEPALIVE_MS = 30_000
_MAX_AGE_MS = 2**31 - 1  # gRPC takes 32 bits


def make_server(
    settings: Settings,
    metrics: Metrics,
    *,
    from_gateway: bool,
    authenticator: Authenticator | None = None,
    tracer: CallTracer | None = None,
    running: CallsInProgress | None = None,
    shares_ports: bool = False,
) -> aio.Server:
    """A server without handlers, which listens nowhere yet.

    Args:
        settings: sizes, ages, and whether calls are logged.
        metrics: where calls are counted.
        from_gateway: whether all its calls come from the gateway.
        authenticator: decides who may call; by default everyone.
        tracer: makes the spans of calls, where there are traces.
        running: counts callers' calls while they run.
        shares_ports: whether other service processes listen on the same port.
    """
    interceptor = CallInterceptor(
        metrics,
        from_gateway=from_gateway,
        access_log=settings.access_log,
        authenticator=authenticator,
        tracer=tracer,
        running=running,
    )
    options = _options(settings, from_gateway=from_gateway, shares_ports=shares_ports)
    return aio.server(interceptors=[interceptor], options=options)


def bind(server: aio.Server, address: str, credentials: Any) -> int:
    """Takes an address, a Unix socket so that only our own user can connect to it.

    Returns:
        The port; something else for a socket.

    Raises:
        RuntimeError: it is in use.
    """
    mask = os.umask(0o177)  # before the socket is there, since afterwards would be too late
    try:
        if credentials is not None:
            return int(server.add_secure_port(address, credentials))
        return int(server.add_insecure_port(address))
    finally:
        os.umask(mask)


def _options(
    settings: Settings, *, from_gateway: bool, shares_ports: bool = False
) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_request_bytes * 2),
        ("grpc.max_send_message_length", MAX_REPLY_BYTES),
        # Equal, because between them gRPC refuses calls at random.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # Envoy pings silent streams; by default that counts as abuse after a while.
        ("grpc.http2.max_ping_strikes", 0),
        # And the server pings callers, so that one that is gone is noticed.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
        # A second server must not share the port; the service processes of one server do, and its
        # supervisor has seen before that nobody else has it.
        ("grpc.so_reuseport", int(shares_ports)),
        *(() if from_gateway else _connection_age(settings.max_connection_seconds)),
    ]


def _connection_age(seconds: int) -> tuple[tuple[str, int], ...]:
    """Options that tell callers to connect anew, so that a balancer can spread them again.

    Their calls have as long once more to end. Envoy's connections stay: all callers share them.
    """
    if not seconds:
        return ()
    milliseconds = min(seconds * 1000, _MAX_AGE_MS)
    return (
        ("grpc.max_connection_age_ms", milliseconds),
        ("grpc.max_connection_age_grace_ms", milliseconds),
    )
