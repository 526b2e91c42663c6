"""Finds and encodes the images of a step, and says which of its rows get their embeddings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.model_input import ImageRows, Span
from ..protocol.images import Image
from ..scheduling.scheduler import ScheduledBatch
from ..scheduling.sequence import Sequence
from .encoder import Embeddings, ImageEncoder

logger = logging.getLogger(__name__)


class _Part(NamedTuple):
    """Rows `row` … of a step, which get the embeddings `first` … `first + length - 1`."""

    row: int
    first: int
    length: int


class StepImages:
    """The images of the steps of one engine.

    Args:
        encoder: the model's.
        device: where a step's tensors are when the model gets them.
        are_whole: whether the tokens of an image see the later ones.
    """

    def __init__(
        self, encoder: ImageEncoder, device: torch.device, *, are_whole: bool = False
    ) -> None:
        self._encoder = encoder
        self._device = device
        self._are_whole = are_whole

    def prepare(self, batch: ScheduledBatch) -> dict[Sequence, str]:
        """Encodes the images of a step.

        Returns:
            The sequences whose images cannot be encoded, which must leave the step, and why.
        """
        failed = {}
        for sequence, num_tokens in batch.num_tokens.items():
            if not sequence.request.images:
                continue
            try:
                self._place(sequence)
                for image in _images(sequence, num_tokens):
                    self._encoder.encode(image)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # the model's own code; the other sequences go on
                logger.exception("an image cannot be encoded")
                failed[sequence] = f"an image cannot be encoded: {error}"
        return failed

    def rows(self, batch: ScheduledBatch, positions: Tensor) -> ImageRows[Tensor] | None:
        """The rows of a step that get embeddings of images; None if there is nothing of a prompt.

        Args:
            batch: after `prepare`.
            positions: int64 [num_tokens], which hold for all other rows.
        """
        rows: list[int] = []
        tokens: list[Tensor] = []
        deepstack: list[tuple[Tensor, ...]] = []
        placed: list[tuple[int, Tensor]] = []
        spans: list[Span] = []
        start = 0
        for index, (sequence, num_tokens) in enumerate(batch.num_tokens.items()):
            first = sequence.num_computed_tokens
            for embeddings, part in self._parts(sequence, num_tokens, start):
                rows += range(part.row, part.row + part.length)
                end = part.first + part.length
                tokens.append(embeddings.tokens[part.first : end])
                deepstack.append(tuple(layer[part.first : end] for layer in embeddings.deepstack))
            if isinstance(sequence.image_positions, Tensor):
                placed.append((start, sequence.image_positions[:, first : first + num_tokens]))
            if self._are_whole:
                spans += _spans(sequence, num_tokens, index, start)
            start += num_tokens
        if not rows and not any(part.shape[1] for _, part in placed):
            return None
        return ImageRows(
            torch.tensor(rows, dtype=torch.int64, device=self._device),
            self._joined(tokens),
            tuple(self._joined(list(layers)) for layers in zip(*deepstack, strict=True)),
            _three(positions, placed) if placed else None,
            (*spans,),
        )

    def _parts(
        self, sequence: Sequence, num_tokens: int, start: int
    ) -> Iterator[tuple[Embeddings, _Part]]:
        for image in _images(sequence, num_tokens):
            embeddings = self._encoder.encode(image)
            for part in _overlaps(image, sequence.num_computed_tokens, num_tokens):
                yield embeddings, part._replace(row=start + part.row)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(self._device) if parts else torch.empty(0, device=self._device)

    def _place(self, sequence: Sequence) -> None:
        """Gives a sequence its three positions per token, in models that have them."""
        if sequence.image_positions is None:
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            positions = self._encoder.positions(prompt, sequence.request.images)
            if positions is not None:
                sequence.image_positions = positions
                sequence.position_delta = int(positions.max()) + 1 - len(prompt)


def _images(sequence: Sequence, num_tokens: int) -> Iterator[Image]:
    """The images with placeholders among the next tokens of a sequence."""
    first = sequence.num_computed_tokens
    for image in sequence.request.images:
        if image.is_within(first, first + num_tokens):
            yield image


def _overlaps(image: Image, first: int, num_tokens: int) -> Iterator[_Part]:
    """The parts of an image's embeddings for some of a sequence's tokens; rows count from these."""
    done = 0
    for start, length in image.spans:
        begin, end = max(start, first), min(start + length, first + num_tokens)
        if begin < end:
            yield _Part(begin - first, done + begin - start, end - begin)
        done += length


def _spans(sequence: Sequence, num_tokens: int, index: int, row: int) -> Iterator[Span]:
    """The tokens of images among the next ones of a sequence, which see each other."""
    first = sequence.num_computed_tokens
    for image in _images(sequence, num_tokens):
        for start, length in image.spans:
            begin, end = max(start, first), start + length
            if begin < min(end, first + num_tokens):
                assert end <= first + num_tokens, "a step ends within an image"
                yield Span(index, row + begin - first, end - begin, end)


def _three(positions: Tensor, placed: list[tuple[int, Tensor]]) -> Tensor:
    """Int64 [3, num_tokens]: three equal ones, but those of prompts with images."""
    three = positions.expand(3, -1).clone()
    for start, part in placed:
        three[:, start : start + part.shape[1]] = part.to(three.device)
    return three
