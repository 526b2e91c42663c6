"""The images of prompts: found where they are, and made ready for the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..workers.budget import ByteBudget
from ..workers.gather import gather
from .data_url import image_bytes, invalid, is_data_url
from .formats import check_format
from .image_workers import ImageWorkers
from .pictured import Pictures
from .source import ImageSource

if TYPE_CHECKING:  # else an HTTP client would be imported where nothing is fetched
    from .fetcher import ImageFetcher


class Images:
    """Takes images of requests.

    Args:
        workers: decode them.
        max_bytes: of an image's file.
        max_fetched_bytes: of all that are fetched and not decoded yet; more are refused.
        fetcher: fetches them; without one, http and https URLs are refused.
    """

    def __init__(
        self,
        workers: ImageWorkers,
        *,
        max_bytes: int,
        max_fetched_bytes: int,
        fetcher: ImageFetcher | None = None,
    ) -> None:
        self._workers = workers
        self._max_bytes = max_bytes
        self._budget = ByteBudget(max_fetched_bytes)
        self._fetcher = fetcher

    async def start(self) -> None:
        """Starts the processes, so that the first image does not wait for it."""
        await self._workers.start()

    async def close(self) -> None:
        """Ends processes and connections."""
        await self._workers.close()
        if self._fetcher is not None:
            await self._fetcher.close()

    async def pictures(self, sources: Sequence[ImageSource]) -> Pictures:
        """Images that are ready for the model.

        Args:
            sources: of a prompt, at least one.

        Raises:
            ServiceError: one cannot be used, or they take too much together.
        """
        with self._budget.growing() as take:
            fetched = await self._fetched(sources, take)
            return await self._workers.pictures(self._files(sources, fetched))

    async def _fetched(
        self, sources: Sequence[ImageSource], take: Callable[[int], None]
    ) -> dict[str, bytes]:
        """The files at http and https URLs, all fetched at the same time, each once."""
        fetcher = self._fetcher
        if fetcher is None:
            return {}
        wanted = {
            item.url: item.field
            for item in reversed(sources)
            if item.data is None and not is_data_url(item.url)
        }
        files = await gather(fetcher.fetch(url, field, take) for url, field in wanted.items())
        return dict(zip(wanted, files, strict=True))

    def _files(
        self, sources: Sequence[ImageSource], fetched: Mapping[str, bytes]
    ) -> Iterator[tuple[str, bytes]]:
        for source in sources:
            data = source.data
            if data is None:
                data = fetched.get(source.url)
            if data is None:
                data = image_bytes(source.url, source.field)
            if len(data) > self._max_bytes:
                reason = f"must have at most {self._max_bytes} bytes. Given: {len(data)}"
                raise invalid(source.field, reason)
            check_format(source, data)
            yield source.field, data
