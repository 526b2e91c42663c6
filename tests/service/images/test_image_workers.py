"""Files made to do harm cost their sender an error, and nobody else anything."""

from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from service.errors import ServiceError
from service.images import image_workers
from service.images.image_workers import ImageWorkers
from service.images.pictured import Picture

pytest.importorskip("PIL")

from tests.e2e.image_checkpoint import make, picture, png

FIELD = "messages[0].content[0].image_url.url"
MAX_PIXELS = 4_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make(folder)
    return folder


@pytest_asyncio.fixture
async def workers(checkpoint: Path) -> AsyncIterator[ImageWorkers]:
    made = ImageWorkers(
        [str(checkpoint), None, False], max_pixels=MAX_PIXELS, deadline_s=100.0, max_bytes=1 << 24
    )
    yield made
    await made.close()


def png_of(width: int, height: int, data: bytes) -> bytes:
    """A PNG that says what it likes of its size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


async def asked(workers: ImageWorkers, *files: bytes) -> tuple[Picture, ...]:
    return (await workers.pictures([(FIELD, file) for file in files])).all


HARMFUL = {
    "a bomb by its size": (png_of(60_000, 60_000, b""), "must have at most 4000000 pixels"),
    "no pixels": (png_of(0, 5, b""), "image"),
    "data that ends": (png_of(100, 100, b"\0" * 50), "cannot be decoded"),
    "no image": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image in one of"),
    "a program": (b"%!PS\nshowpage\n", "is not an image in one of"),
    "nothing": (b"", "is not an image in one of"),
}


async def test_what_cannot_be_decoded_is_refused(workers: ImageWorkers) -> None:
    for data, said in HARMFUL.values():
        with pytest.raises(ServiceError, match=said) as caught:
            await asked(workers, data)
        assert caught.value.field == FIELD
    assert len(await asked(workers, png(picture(1)))) == 1


async def test_equal_images_have_the_same_digest(workers: ImageWorkers) -> None:
    found = await asked(workers, png(picture(1)), png(picture(2)), png(picture(1)))
    first, other, again = (item.image for item in found)
    assert first == again
    assert first.digest != other.digest
    assert first.num_tokens == 4


async def test_images_that_take_too_much_together_are_refused(
    workers: ImageWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = await asked(workers, png(picture(1)))
    monkeypatch.setattr(image_workers, "MAX_TENSOR_BYTES", 2 * first.image.num_bytes)
    await asked(workers, *[png(picture(1))] * 2)
    with pytest.raises(ServiceError, match="must take at most"):
        await asked(workers, *[png(picture(1))] * 3)
