"""The server over REST: JSON, and server-sent events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import httpx

from ..client.credentials import Credentials
from ..client.target import Target
from .answer import HEADERS, ChatError, Piece, piece, refusal

_CONNECT_S = 10.0
_DONE = b"[DONE]"


class RestServer:
    """See Server. Proxies are not used.

    Args:
        target: where the server is.
        credentials: what it may ask for.
        http: what connects, for tests; by default the network.
    """

    def __init__(
        self, target: Target, credentials: Credentials, http: httpx.BaseTransport | None = None
    ) -> None:
        self._url = target.url
        self._client = httpx.Client(
            base_url=target.url,
            timeout=httpx.Timeout(None, connect=_CONNECT_S),  # an answer may wait in the queue
            headers=(*credentials.headers, *HEADERS),
            verify=credentials.ssl_context(),
            trust_env=False,
            transport=http,
        )

    def model(self) -> str:
        """See Server."""
        with self._translated():
            reply = self._client.get("/info")
            _check(reply)
            return str(_json(reply.content).get("model_id", ""))

    def answer(self, body: dict[str, Any]) -> Generator[Piece]:
        """See Server."""
        with (
            self._translated(),
            self._client.stream("POST", "/v1/chat/completions", json=body) as reply,
        ):
            _check(reply)
            for data in _events(reply.iter_bytes()):
                chunk = _json(data)
                if "error" in chunk:
                    raise ChatError(_message(chunk))
                yield piece(chunk)

    def close(self) -> None:
        """See Server."""
        self._client.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"no answer from {self._url}: {text}") from error


def _check(reply: httpx.Response) -> None:
    if reply.is_success:
        return
    reply.read()
    try:
        message = _message(_json(reply.content))
    except ChatError:  # a proxy's page
        message = reply.reason_phrase
    raise refusal(str(reply.status_code), message, reply.headers.get("retry-after"))


def _events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""The data of events, whose lines end with \n only: httpx's own also end at U+2028."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != _DONE:
                yield data


def _json(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    raise ChatError("the server's answer is no JSON object; is it Tokenwire?")


def _message(body: dict[str, Any]) -> str:
    """The text of an error, in TGI's form or in OpenAI's."""
    error = body.get("error")
    return str(error.get("message") if isinstance(error, dict) else error)
