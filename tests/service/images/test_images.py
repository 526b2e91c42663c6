"""Images of requests are found where they are: each once, and within a budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from service.errors import ErrorKind, ServiceError
from service.images.images import Images
from service.images.source import ImageSource

PNG = "data:image/png;base64,aGVsbG8="


class Workers:
    """Stands for the processes: remembers what they decode."""

    def __init__(self) -> None:
        self.decoded: list[tuple[str, bytes]] = []

    async def pictures(self, images: Iterable[tuple[str, bytes]]) -> Any:
        self.decoded += images


class Fetcher:
    """Stands for the network: files by URL."""

    def __init__(self, **files: bytes) -> None:
        self.files = files
        self.asked: list[str] = []

    async def fetch(self, url: str, field: str, take: Callable[[int], None]) -> bytes:
        self.asked.append(url)
        await asyncio.sleep(0)
        if url not in self.files:
            raise ServiceError(ErrorKind.VALIDATION, "not there", field=field)
        take(len(self.files[url]))
        return self.files[url]


def images(fetcher: Any = None, max_bytes: int = 10) -> tuple[Images, Workers]:
    workers: Any = Workers()
    made = Images(workers, max_bytes=max_bytes, max_fetched_bytes=20, fetcher=fetcher)
    return made, workers


def sources(*urls: str) -> list[ImageSource]:
    return [ImageSource(f"images[{index}]", url) for index, url in enumerate(urls)]


async def test_files_are_in_the_order_of_the_request_and_fetched_once() -> None:
    fetcher = Fetcher(a=b"1", b=b"2")
    made, workers = images(fetcher)
    await made.pictures([*sources("b", PNG, "a", "b"), ImageSource("parts[0]", data=b"3")])
    fields = ["images[0]", "images[1]", "images[2]", "images[3]", "parts[0]"]
    assert workers.decoded == list(zip(fields, [b"2", b"hello", b"1", b"2", b"3"], strict=True))
    assert sorted(fetcher.asked) == ["a", "b"]


async def test_the_first_place_of_a_url_is_named_in_its_error() -> None:
    made, _ = images(Fetcher())
    with pytest.raises(ServiceError) as caught:
        await made.pictures(sources(PNG, "a", "a"))
    assert caught.value.field == "images[1]"


async def test_a_file_that_is_too_large_is_refused_wherever_it_is() -> None:
    made, _ = images(max_bytes=4)
    for source in (ImageSource("x", PNG), ImageSource("x", data=b"hello")):
        with pytest.raises(ServiceError, match=r"`x` must have at most 4 bytes\. Given: 5"):
            await made.pictures([source])


async def test_what_others_hold_is_not_there_for_a_request() -> None:
    fetcher = Fetcher(a=b"x" * 10, b=b"x" * 10, c=b"x" * 11)
    made, workers = images(fetcher)
    is_held, may_end = asyncio.Event(), asyncio.Event()
    decode = workers.pictures

    async def slowly(files: Iterable[tuple[str, bytes]]) -> None:
        is_held.set()
        await may_end.wait()
        await decode(files)

    vars(workers)["pictures"] = slowly
    first = asyncio.ensure_future(made.pictures(sources("a")))
    await is_held.wait()
    with pytest.raises(ServiceError) as caught:
        await made.pictures(sources("c"))
    assert caught.value.kind is ErrorKind.OVERLOADED
    may_end.set()
    await first
    await made.pictures(sources("a", "b"))


async def test_nothing_is_fetched_without_a_fetcher() -> None:
    made, _ = images()
    with pytest.raises(ServiceError, match="this server fetches no images"):
        await made.pictures(sources("http://a.b/x.png"))
