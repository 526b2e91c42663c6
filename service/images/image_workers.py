"""The processes that decode images: a file made to do harm costs its sender an error.

Decoders are C, files say how large they are, and both lie at times. So a process has a limit of
memory and a deadline, is killed when it exceeds them, and no other request waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.protocol.images import Image

from ..errors import overloaded
from ..workers.budget import ByteBudget
from ..workers.crew import Crew
from ..workers.process import DeadError, LateError
from .data_url import invalid
from .pictured import Picture, Pictures

_WORKER_BYTES = 4 * 1024**3  # address space of a process
_NUM_WORKERS = 2
MAX_TENSOR_BYTES = 256 * 1024**2  # of a request's images: they are one message to the engine


class ImageWorkers:
    """The processes.

    Args:
        setup: what they load the processor by.
        max_pixels: of an image.
        deadline_s: seconds that one image may take.
        max_bytes: of the files that are in work or wait; more are refused.
    """

    def __init__(
        self, setup: list[Any], *, max_pixels: int, deadline_s: float, max_bytes: int
    ) -> None:
        self._max_pixels = max_pixels
        self._deadline_s = deadline_s
        self._budget = ByteBudget(max_bytes)
        self._crew = Crew(
            f"{__package__}.worker", setup, max_bytes=_WORKER_BYTES, num_workers=_NUM_WORKERS
        )

    async def start(self) -> None:
        """Starts the processes, so that the first image does not wait for it."""
        await self._crew.start()

    async def close(self) -> None:
        """Ends the processes."""
        await self._crew.close()

    async def pictures(self, images: Iterable[tuple[str, bytes]]) -> Pictures:
        """Images that are ready for the model.

        Args:
            images: of a prompt, at least one: for each the field where it stands in the
                request, and its file.

        Raises:
            ServiceError: one cannot be used, or they take too much together.
        """
        pictures, answer, num_bytes = [], {}, 0
        given = [*images]
        for field, data in given:
            answer = await self._decoded(data, field, len(given))
            before, after = answer["around"]
            image = Image.unpacked(answer["image"])
            picture = Picture(tuple(answer["ids"]), image, before, after)
            pictures.append(picture)
            num_bytes += picture.image.num_bytes
            if num_bytes > MAX_TENSOR_BYTES:
                raise invalid(
                    field,
                    f"and the images before it must take at most {MAX_TENSOR_BYTES} bytes as the "
                    f"model sees them. Given: {num_bytes}",
                )
        shown = tuple(answer["shown"])
        return Pictures(tuple(pictures), answer["mark"], shown, answer["mark_text"])

    async def _decoded(self, data: bytes, field: str, num_images: int) -> dict[str, Any]:
        """An image's tokens and tensors.

        Args:
            data: the file.
            field: where it stands in the request.
            num_images: of its prompt.

        Raises:
            ServiceError: it is no image that can be read, too large, or too much waits already.
        """
        with self._budget.hold(len(data)):
            answer = await self._answer(
                {"data": data, "max_pixels": self._max_pixels, "num_images": num_images}, field
            )
        if "error" in answer:
            raise invalid(field, answer["error"])
        return answer

    async def _answer(self, request: dict[str, Any], field: str) -> dict[str, Any]:
        try:
            async with self._crew.worker() as worker:
                answer: dict[str, Any] = await worker.ask(request, self._deadline_s)
                return answer
        except LateError as error:
            if error.is_starved:
                raise overloaded() from None
            raise invalid(field, f"takes more than {self._deadline_s:g} s to decode") from None
        except DeadError:
            raise invalid(
                field, "cannot be decoded: it needs too much memory, or its process failed"
            ) from None
