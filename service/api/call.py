"""One RPC call: its metadata, whether it came over REST or gRPC, and the headers of its reply."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from grpc import aio

from ..codec.presenter import Presenter, RestPresenter, TypedPresenter
from ..pb.google import api as _api  # noqa: F401  importing a package adds it to the pool
from ..pb.tokenwire import v1 as _v1  # noqa: F401

# Envoy's transcoder sets it on REST calls; Envoy removes it from gRPC calls.
_ORIGINAL_PATH = "x-envoy-original-path"


class Call:
    """One call, as its handler sees it.

    Attributes:
        received: when it arrived, in seconds of the monotonic clock.
        metadata: the caller's metadata, without binary values.
        is_rest: whether Envoy made it from a REST request.
        presenter: makes replies in the form that this caller expects.
    """

    def __init__(self, context: aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self.received = time.monotonic()
        self.metadata = {
            key: value
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        }
        self.is_rest = _ORIGINAL_PATH in self.metadata
        self.presenter: Presenter = RestPresenter() if self.is_rest else TypedPresenter()

    async def send_headers(self, headers: Mapping[str, str]) -> None:
        """Sends response headers (gRPC: initial metadata).

        To be called only before a successful reply: once they are sent, an error cannot have a REST
        status of its own.
        """
        await self._context.send_initial_metadata(tuple(headers.items()))
