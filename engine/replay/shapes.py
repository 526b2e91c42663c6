"""Which steps are recorded on a GPU: numbers of tokens, sequences and rows of logits.

Decode steps have a token, or a few draft tokens, of each sequence. Beside them a step may compute
prompts, and under real traffic most steps do: short ones would wait for Python, too, since a GPU
computes 50 tokens hardly slower than one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..protocol.config import EngineConfig

# Tokens and sequences of steps with prompts. More tokens take a GPU longer than Python takes for
# the launches; steps with fewer sequences waste little. Estimated, and not measured on a GPU.
_MIXED = ((512, 256), (512, 32), (256, 32), (128, 32), (64, 32))


class Shape(NamedTuple):
    """Of a recorded step, which computes a smaller one together with padding rows."""

    num_tokens: int
    num_seqs: int
    num_rows: int

    @property
    def is_plain(self) -> bool:
        """Whether each sequence has one token: sequence i has token i."""
        return self.num_tokens == self.num_seqs

    @property
    def has_all_rows(self) -> bool:
        """Whether the logits of all tokens are wanted: row i is token i."""
        return self.num_rows == self.num_tokens

    @property
    def kind(self) -> tuple[bool, bool]:
        """What its rows look like when they are filled up."""
        return self.is_plain, self.has_all_rows


def largest_by_kind(shapes: Iterable[Shape]) -> dict[tuple[bool, bool], Shape]:
    """For each kind a shape as large as the largest of them, whose memory the others can share."""
    largest: dict[tuple[bool, bool], Shape] = {}
    for shape in shapes:
        before = largest.get(shape.kind, shape)
        largest[shape.kind] = Shape(*map(max, shape, before))
    return largest


def decode_shapes(sizes: Iterable[int], *, with_drafts: bool = False) -> list[Shape]:
    """Decode steps of these numbers of tokens, the largest first, and the same with drafts.

    With draft tokens there is at least one token more than sequences.
    """
    ordered = sorted(set(sizes), reverse=True)
    shapes = [Shape(size, size, size) for size in ordered]
    if with_drafts:
        shapes += [Shape(size, size - 1, size) for size in ordered if size > 1]
    return shapes


def mixed_shapes(*, max_step_tokens: int, max_num_seqs: int) -> list[Shape]:
    """Steps with prompts, the largest first; each sequence has at most one row of logits."""
    shapes = [
        Shape(num_tokens, min(num_seqs, max_num_seqs), min(num_seqs, max_num_seqs))
        for num_tokens, num_seqs in _MIXED
        if num_tokens <= max_step_tokens
    ]
    return [*dict.fromkeys(shapes)]


def recorded_shapes(config: EngineConfig) -> list[Shape]:
    """All steps that an engine records on a GPU; none if no size above 0 is configured."""
    sizes = [size for size in config.graph_sizes if 0 < size <= config.max_num_seqs]
    if not sizes:
        return []
    mixed = mixed_shapes(max_step_tokens=config.max_step_tokens, max_num_seqs=config.max_num_seqs)
    return [*decode_shapes(sizes, with_drafts=config.speculate > 0), *mixed]
