"""One call: who made it, over which face, and the headers of its reply."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from grpc import aio

from ..codec.presenter import Presenter, RestPresenter, TypedPresenter
from ..pb.google import api as _api  # noqa: F401  the pool knows a package once it is imported
from ..pb.tokenwire import v1 as _v1  # noqa: F401

_ORIGINAL_PATH = "x-envoy-original-path"  # set by the gateway's transcoder, and by nothing else


class Call:
    """One call: who made it, and the headers of its reply."""

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

        Only ever before a good message: an error after them has no status of its own any more.
        """
        await self._context.send_initial_metadata(tuple(headers.items()))
