"""The input of one forward pass.

The tokens of all sequences are concatenated, whether a sequence prefills or decodes::

    sequence          A (decode)   B (prefill, 3 of 5 tokens)   C (decode)
    input_ids       [ a9         | b0  b1  b2                 | c4 ]    num_tokens = 5
    positions       [ 9          | 0   1   2                  | 4  ]
    query_start_loc [ 0            1                            4    5 ]
    context_lens    [ 10           3                            5  ]    tokens cached after the step
    logits_rows     [ 0                                         4  ]    B gets no token yet
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..scheduling.sequence import Sequence

T = TypeVar("T")
U = TypeVar("U")


class WindowInput(NamedTuple):
    """Where the tokens of layers with a window are, if these have blocks of their own.

    `window` is the largest window of such a layer. `slot_mapping` and `block_tables` are as those
    of `AttentionInput`; blocks that no token of the step sees are 0.
    """

    window: int
    slot_mapping: Tensor
    block_tables: Tensor


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """What attention needs in addition to query, key and value.

    `slot_mapping` int64 [num_tokens]: the slot of a token's key and value in the cache, block *
    block_size + offset. `block_tables` int32 [num_seqs, max_blocks], padded with 0.
    `query_start_loc` int32 [num_seqs + 1]: where each sequence's tokens start. `context_lens` int32
    [num_seqs]: the tokens of each sequence in the cache, this step's included. `window` is for
    layers with a window, if they do not use the same slots as the others.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    window: WindowInput | None = None


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The rows of logits that give a prompt's log-probabilities.

    Row `start + i` of the logits belongs to the prompt token `target_ids[i]` that follows it.
    """

    sequence: Sequence
    start: int
    target_ids: list[int]


class AdapterRows(NamedTuple):
    """The tokens of sequences that have an adapter.

    `rows` int64 [num_rows]: which of the step's tokens; None for all. `owners` int64 [num_rows]:
    the adapter of each, an index into `names`, which are digests; without names, its slot on the
    device, and -1 for none.
    """

    rows: Tensor | None
    owners: Tensor
    names: tuple[str, ...] = ()


class SequenceState(NamedTuple):
    """The state of a sequence in a step.

    `slot` is where it is; `begins` says that it is empty yet. `source` is the slot of one that was
    kept, if the sequence goes on from there. `copies` are slots in which the state is kept for
    others, each with the number of the sequence's tokens in the step after which it is. `drafts`
    are slots for the states before each draft token.
    """

    slot: int
    begins: bool
    source: int | None = None
    copies: tuple[tuple[int, int], ...] = ()
    drafts: tuple[int, ...] = ()


class StateRows(NamedTuple):
    """The sequences of a step, for layers that compute each with its own state; on the host.

    `starts` [num_seqs + 1]: where each sequence's tokens start. `sequences` [num_seqs]. `device` is
    that of the step's tensors. In a step in which every sequence has one token, and nothing else
    becomes of its state, there is `decoding` alone, int64 [num_seqs] on that device: its slots.
    """

    starts: list[int]
    sequences: list[SequenceState]
    device: torch.device
    decoding: Tensor | None = None

    @classmethod
    def decode(cls, slots: Tensor) -> StateRows:
        """Those of a step with one token of each sequence."""
        return cls([], [], slots.device, slots)


class Span(NamedTuple):
    """Tokens of an image that see each other, the later ones included.

    They are the rows `row` … `row + length - 1` of a step, of the sequence with this index in it,
    whose positions end before `end`.
    """

    sequence: int
    row: int
    length: int
    end: int


class ImageRows(NamedTuple, Generic[T]):
    """The tokens of a step whose embeddings come from images: tensors, or something for each.

    `rows` int64 [num_rows]: which of the step's tokens. `embeddings` [num_rows, hidden_size] are
    theirs; `deepstack` has what some models add to their hidden states after the first layers.
    `positions` int64 [3, num_tokens]: those of all tokens of the step, for models that have three
    per token and a prompt with images in the step. `spans` are the tokens that see each other, in
    models whose attention over an image goes in both directions.
    """

    rows: T
    embeddings: T
    deepstack: tuple[T, ...] = ()
    positions: T | None = None
    spans: tuple[Span, ...] = ()

    def mapped(self, function: Callable[[T], U]) -> ImageRows[U]:
        """The same with what a function makes of each of them, which it gets in their order."""
        return ImageRows(
            function(self.rows),
            function(self.embeddings),
            tuple(map(function, self.deepstack)),
            None if self.positions is None else function(self.positions),
            self.spans,
        )


@dataclass(frozen=True, slots=True)
class ModelInput:
    """The input of one forward pass.

    `input_ids` and `positions` int64 [num_tokens]; `logits_rows` int64 [num_rows]: the tokens whose
    logits are wanted. `sampled` says which rows of the logits a sequence's next tokens are sampled
    from: one row, and one more for each draft token. `adapters` is None if no sequence has one,
    `states` if the model has no state beside the KV cache, and `images` in a step without any.
    `previous` int64 [sampled rows of the previous step] is on the device: the tokens that ids below
    0 stand for, if there are such; see `filled`.
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionInput
    logits_rows: Tensor
    sampled: dict[Sequence, range]
    prompt_rows: list[PromptRows]
    adapters: AdapterRows | None = None
    states: StateRows | None = None
    images: ImageRows[Tensor] | None = None
    previous: Tensor | None = None

    def filled(self, previous: Tensor) -> ModelInput:
        """The same with the previous step's tokens in place of ids that stand for them."""
        return replace(
            self, input_ids=_without_placeholders(self.input_ids, previous), previous=None
        )


def _without_placeholders(input_ids: Tensor, sampled_ids: Tensor) -> Tensor:
    """Replaces ids below 0 by the tokens they stand for: see `Sequence.append_placeholder`."""
    sampled = sampled_ids[(-1 - input_ids).clamp(min=0)]
    return torch.where(input_ids < 0, sampled, input_ids)
