"""The server over REST: JSON, and server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx

from ..client.credentials import Credentials
from ..client.target import Target
from .transport import (
    INCOMPLETE,
    TEMPERATURE,
    UNARY_TIMEOUT_S,
    Failure,
    RequestFailed,
    Task,
)

_OK = 200


class RestTransport:
    """See Transport. Connections are kept and not limited in number; proxies are not used.

    Args:
        target: where the server is.
        credentials: what it may ask for.
        http: what connects, for tests; by default the network.
    """

    def __init__(
        self,
        target: Target,
        credentials: Credentials | None = None,
        http: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        credentials = credentials or Credentials()
        self._client = httpx.AsyncClient(
            base_url=target.url,
            timeout=None,  # noqa: S113 - the load has a timeout of its own
            limits=httpx.Limits(keepalive_expiry=None),
            headers=credentials.headers,
            verify=credentials.ssl_context(),
            trust_env=False,
            transport=http,
        )

    async def token_stops(self, text: str) -> list[int]:
        """See Transport."""
        reply = await self._unary("POST", "/tokenize", json={"inputs": text})
        try:
            return [token["stop"] for token in json.loads(reply)]
        except (ValueError, TypeError, KeyError):
            raise RequestFailed(
                Failure("not_tokens", "200", "the answer to /tokenize is no list of tokens")
            ) from None

    async def metrics(self) -> str:
        """See Transport."""
        return (await self._unary("GET", "/metrics")).decode(errors="replace")

    async def stream(self, task: Task) -> AsyncGenerator[None]:
        """See Transport."""
        body = {
            "inputs": task.prompt,
            "parameters": {
                "do_sample": True,
                "temperature": TEMPERATURE,
                "max_new_tokens": task.max_new_tokens,
                "seed": task.seed,
            },
        }
        last = b""
        try:
            async with self._client.stream("POST", "/generate_stream", json=body) as reply:
                if reply.status_code != _OK:
                    raise RequestFailed(_failure(reply.status_code, await reply.aread()))
                async for line in _lines(reply.aiter_bytes()):
                    if line.startswith(b"data:"):
                        last = line
                        yield
        except httpx.HTTPError as error:
            raise RequestFailed(_no_answer(error)) from error
        _check_end(last)

    async def close(self) -> None:
        """See Transport."""
        await self._client.aclose()

    async def _unary(self, method: str, path: str, **keywords: Any) -> bytes:
        try:
            reply = await self._client.request(method, path, timeout=UNARY_TIMEOUT_S, **keywords)
        except httpx.HTTPError as error:
            raise RequestFailed(_no_answer(error)) from error
        if reply.status_code != _OK:
            raise RequestFailed(_failure(reply.status_code, reply.content, path))
        return reply.content


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    r"""Lines, which end with \n only: httpx's own also end at U+2028, which a text may contain."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


def _check_end(line: bytes) -> None:
    """Checks the last event, the only one that is parsed, since parsing delays other requests.

    Raises:
        RequestFailed: it is not the end of a text.
    """
    try:
        event = json.loads(line.removeprefix(b"data:"))
    except ValueError:
        raise RequestFailed(INCOMPLETE) from None
    if "error" in event:
        raise RequestFailed(_failure(_OK, line.removeprefix(b"data:")))
    if event.get("generated_text") is None:
        raise RequestFailed(INCOMPLETE)


def _failure(status: int, body: bytes, path: str = "/generate_stream") -> Failure:
    try:
        error = json.loads(body)
        return Failure(str(error["error_type"]), str(status), str(error["error"]))
    except (ValueError, TypeError, KeyError):  # not an answer in TGI's form, e.g. a proxy's
        return Failure("http", str(status), f"the answer to {path} has status {status}")


def _no_answer(error: httpx.HTTPError) -> Failure:
    return Failure("connection", "", str(error) or type(error).__name__)
