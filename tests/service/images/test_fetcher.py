"""Images are fetched from listed hosts alone, within bounds of time and size."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.access.media_hosts import MediaHosts
from service.errors import ErrorKind, ServiceError, overloaded
from service.images import fetcher as module
from service.images.fetcher import ImageFetcher
from service.images.public_network import Resolve
from tests.certificates import Authority
from tests.image_host import Answer, ImageHost, endless, image_host, moved, ok, status

FIELD = "messages[0].content[0].image_url.url"
MAX_BYTES = 100_000
FILE = b"a picture" * 1000


@pytest.fixture
def host() -> Iterator[ImageHost]:
    with image_host() as made:
        yield made


@asynccontextmanager
async def fetching(
    *entries: str,
    deadline_s: float = 60.0,
    resolve: Resolve | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Callable[[str], asyncio.Future[bytes]]]:
    """What fetches from these hosts."""
    made = ImageFetcher(
        MediaHosts.of(entries), max_bytes=MAX_BYTES, deadline_s=deadline_s, resolve=resolve, tls=tls
    )
    try:
        yield lambda url: asyncio.ensure_future(made.fetch(url, FIELD, lambda _: None))
    finally:
        await made.close()


async def refused(fetch: Callable[[str], asyncio.Future[bytes]], url: str) -> str:
    """Why a URL is refused; the host's words are not in it."""
    with pytest.raises(ServiceError) as caught:
        await fetch(url)
    error = caught.value
    assert (error.kind, error.field) == (ErrorKind.VALIDATION, FIELD)
    assert "secret" not in str(error)
    return error.reason


async def test_a_file_is_fetched_as_it_is(host: ImageHost, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    host.answers["/x.png?size=1"] = ok(FILE)
    async with fetching(host.place) as fetch:
        assert await fetch(host.url("/x.png?size=1#top")) == FILE
    (head,) = host.requests
    assert head.startswith("GET /x.png?size=1 HTTP/1.1\r\n")
    assert f"host: {host.place}\r\n" in head.lower()
    assert "cookie" not in head.lower()
    assert "authorization" not in head.lower()


async def test_localhost_is_fetched_from_where_it_is_listed(host: ImageHost) -> None:
    async def resolve(_: str, __: int) -> list[str]:
        return ["127.0.0.1"]

    host.answers["/x.png"] = ok(FILE)
    async with fetching(f"localhost:{host.port}", resolve=resolve) as fetch:
        assert await fetch(host.url("/x.png", name="localhost")) == FILE


async def test_a_listed_name_of_a_private_address_is_refused(host: ImageHost) -> None:
    async def resolve(_: str, __: int) -> list[str]:
        return ["127.0.0.1"]

    async with fetching(f"images.example:{host.port}", resolve=resolve) as fetch:
        said = await refused(fetch, host.url("/x.png", name="images.example"))
    assert "an address that is not public" in said
    assert host.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",  # another port
        "http://localhost:{port}/x.png",
        "http://127.0.0.2:{port}/x.png",
        "http://2130706433:{port}/x.png",
        "http://0x7f.1:{port}/x.png",
        "http://[::ffff:127.0.0.1]:{port}/x.png",
        "http://user@127.0.0.1:{port}/x.png",
        "ftp://127.0.0.1:{port}/x.png",
    ],
)
async def test_what_is_not_listed_is_not_asked(host: ImageHost, url: str) -> None:
    async with fetching(host.place) as fetch:
        await refused(fetch, url.replace("{port}", str(host.port)))
    assert host.requests == []


NO_FILES: dict[str, tuple[Answer, str]] = {
    "absent": (status("404 Not Found"), "its host answers with status 404"),
    "empty": (status("204 No Content", data=b""), "its host answers with status 204"),
    "moved nowhere": (status("302 Found"), "its host answers with status 302"),
    "failed": (status("500 Oops secret"), "its host answers with status 500"),
    "too large": (ok(b"secret" * 20_000), f"must have at most {MAX_BYTES} bytes"),
    "endless": (endless, f"must have at most {MAX_BYTES} bytes"),
    "compressed": (ok(b"secret", "content-encoding: gzip"), "sends it compressed"),
    "no HTTP": (lambda connection: connection.sendall(b"secret\r\n\r\n"), "the connection to its"),
    "closed": (lambda connection: connection.shutdown(2), "the connection to its host failed"),
    "another port": (moved("https://127.0.0.1/x.png"), "redirected to a URL that has a host or"),
    "another host": (moved("http://169.254.169.254/"), "redirected to a URL that has a host or"),
    "a local file": (moved("file:///etc/passwd"), "redirected to a URL that is neither"),
    "a circle": (moved("/x.png"), "is redirected more than 3 times"),
}


@pytest.mark.parametrize("name", NO_FILES)
async def test_answers_that_are_no_file_are_refused(host: ImageHost, name: str) -> None:
    host.answers["/x.png"], said = NO_FILES[name]
    async with fetching(host.place) as fetch:
        assert said in await refused(fetch, host.url("/x.png"))
        host.answers["/y.png"] = ok(FILE)
        assert await fetch(host.url("/y.png")) == FILE


async def test_redirects_are_followed(host: ImageHost) -> None:
    host.answers["/1"] = moved("2", "301 Moved Permanently")
    host.answers["/2"] = moved(host.url("/3"), "307 Temporary Redirect")
    host.answers["/3"] = moved("/4", "303 See Other")
    host.answers["/4"] = ok(FILE)
    async with fetching(host.place) as fetch:
        assert await fetch(host.url("/1")) == FILE


async def test_a_host_that_does_not_answer_in_time_is_left(host: ImageHost) -> None:
    host.answers["/x.png"] = host.hang
    async with fetching(host.place, deadline_s=0.2) as fetch:
        assert "cannot be fetched within 0.2 s" in await refused(fetch, host.url("/x.png"))


async def test_a_fetch_ends_with_the_caller(host: ImageHost) -> None:
    host.answers["/x.png"] = host.hang
    async with fetching(host.place) as fetch:
        running = fetch(host.url("/x.png"))
        assert await asyncio.to_thread(host.is_asked.wait, 60)
        running.cancel()
        assert await asyncio.to_thread(host.is_left.wait, 60)
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_who_waits_too_long_for_a_turn_is_told_to_come_again(
    host: ImageHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NUM_PLACES", 0)
    async with fetching(host.place, deadline_s=0.01) as fetch:
        with pytest.raises(ServiceError) as caught:
            await fetch(host.url("/x.png"))
    assert caught.value.kind is ErrorKind.OVERLOADED
    assert host.requests == []


async def test_bytes_are_counted_as_they_come(host: ImageHost) -> None:
    host.answers["/x.png"] = ok(FILE)
    taken: list[int] = []
    made = ImageFetcher(MediaHosts.of([host.place]), max_bytes=MAX_BYTES, deadline_s=60.0)
    await made.fetch(host.url("/x.png"), FIELD, taken.append)
    assert sum(taken) == len(FILE)

    def refuse(_: int) -> None:
        raise overloaded()

    with pytest.raises(ServiceError) as caught:
        await made.fetch(host.url("/x.png"), FIELD, refuse)
    assert caught.value.kind is ErrorKind.OVERLOADED
    await made.close()


async def test_a_certificate_must_be_for_the_host(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    for names, is_right in (("IP:127.0.0.1", True), ("DNS:images.example", False)):
        pair = authority.issue(f"server{is_right}", names)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(pair.certificate, pair.key)
        with image_host(server) as host:
            host.answers["/x.png"] = ok(FILE)
            known = ssl.create_default_context(cafile=str(authority.certificate))
            async with fetching(host.place, tls=known) as fetch:
                url = host.url("/x.png", "https")
                if is_right:
                    assert await fetch(url) == FILE
                else:
                    assert "the connection to its host failed" in await refused(fetch, url)
            if is_right:
                async with fetching(host.place) as fetch:  # whose authority is not known
                    assert "the connection to its host failed" in await refused(fetch, url)


async def test_a_certificate_is_for_the_name_and_not_for_its_address(tmp_path: Path) -> None:
    async def resolve(_: str, __: int) -> list[str]:
        return ["127.0.0.1"]

    authority = Authority(tmp_path)
    pair = authority.issue("server", "DNS:localhost")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(pair.certificate, pair.key)
    known = ssl.create_default_context(cafile=str(authority.certificate))
    with image_host(server) as host:
        host.answers["/x.png"] = ok(FILE)
        entries = (host.place, f"localhost:{host.port}")
        async with fetching(*entries, resolve=resolve, tls=known) as fetch:
            assert await fetch(host.url("/x.png", "https", "localhost")) == FILE
            said = await refused(fetch, host.url("/x.png", "https"))
            assert "the connection to its host failed" in said
