"""What both clients are made of: a channel, and what is sent with every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import grpc

from .authorization import call_metadata
from .policy import DEFAULT_RETRIES, DEFAULT_TIMEOUTS, RetryPolicy, Timeouts, channel_options


class Connection:
    """A connection to a server.

    Args:
        address: its gRPC port, as host:port.
        api_key: the caller's key, where the server asks for one. It should travel over TLS only.
        credentials: for TLS, from `grpc.ssl_channel_credentials`; None means plain text.
        metadata: sent with every call, e.g. an `x-request-id`.
        timeouts: how long calls may take. `timeout_s` of a call can only shorten this.
        retries: when a call is made again; None means never.
        options: further ones of the gRPC channel.

    Raises (all methods):
        TokenwireError: the call failed; a class of its own for every reason that matters.
        ValueError, TypeError: an option has no place in the request.
    """

    _grpc: ClassVar[ModuleType]  # grpc or grpc.aio, whose channels are made alike

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] | None = None,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        retries: RetryPolicy | None = DEFAULT_RETRIES,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self._metadata = call_metadata(metadata, api_key)
        options = (*channel_options(timeouts, retries), *options)
        if credentials is None:
            self._channel = self._grpc.insecure_channel(address, options=options)
        else:
            self._channel = self._grpc.secure_channel(address, credentials, options=options)
