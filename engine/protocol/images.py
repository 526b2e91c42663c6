"""Images of a prompt, as the model's own image processor has made tensors of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class ImageTensor(NamedTuple):
    """An argument of the model's image encoder.

    Attributes:
        name: of the argument.
        dtype: "float32", "int64" or "bool".
        shape: the first dimension is that of images, tiles or patches.
        data: the values, in the machine's order of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a prompt.

    Attributes:
        digest: names the image as the encoder sees it: equal ones are encoded once.
        spans: where its placeholders stand among the prompt's tokens, from left to right, each a
            position and a number of tokens.
        tensors: for the encoder.
    """

    digest: bytes
    spans: tuple[tuple[int, int], ...]
    tensors: tuple[ImageTensor, ...]

    @property
    def start(self) -> int:
        """The position of its first placeholder."""
        return self.spans[0][0]

    @property
    def end(self) -> int:
        """The position behind its last placeholder."""
        start, length = self.spans[-1]
        return start + length

    def is_within(self, start: int, end: int) -> bool:
        """Whether one of its placeholders may be among the tokens `start` … `end - 1`."""
        return self.start < end and self.end > start

    @property
    def num_tokens(self) -> int:
        """Its placeholders, each of which gets one of its embeddings."""
        return sum(length for _, length in self.spans)

    @property
    def longest_span(self) -> int:
        """The most placeholders without another token between them."""
        return max(length for _, length in self.spans)

    @property
    def num_bytes(self) -> int:
        """What its tensors take."""
        return sum(len(part.data) for part in self.tensors)

    def packed(self) -> list[Any]:
        """As values for msgpack."""
        return [self.digest, self.spans, self.tensors]

    @classmethod
    def unpacked(cls, values: list[Any]) -> Image:
        """The image of such values.

        Raises:
            ValueError: they are not those of an image.
        """
        digest, spans, tensors = values
        if not spans or not isinstance(digest, bytes):
            raise ValueError("an image has a digest and placeholders")
        return cls(
            digest,
            tuple((int(start), int(length)) for start, length in spans),
            tuple(
                ImageTensor(str(name), str(dtype), tuple(shape), data)
                for name, dtype, shape, data in tensors
            ),
        )
