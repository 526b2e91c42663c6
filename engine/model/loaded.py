"""A model that runs on the paged attention."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.kv_cache import LayerShape
from ..attention.paged import AttentionBackend, AttentionStep, attending
from ..batch.model_input import AttentionInput, ImageRows
from ..recurrent.layer_state import StatePool
from ..recurrent.recurrence import Recurrence, StepStates
from ..shards.cut import Cut
from . import image_part, quantization
from .step_positions import StepPositions


@dataclass(slots=True)
class KnownLogits:
    """Logits of the self-check's text, which one check leaves for the next to compare with.

    Attributes:
        latest: float32 [num_tokens, vocab_size], as the last check has found them; None where they
            are to be computed anew.
    """

    latest: Tensor | None = None

    def forget(self) -> None:
        """Has them computed anew, or frees them where nothing is compared any more."""
        self.latest = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that runs on the paged attention, and the shapes of its cache by layer.

    Attributes:
        model: of transformers.
        layers: the shapes of each layer's keys and values, by the layer's index.
        device: where it is.
        dtype: of its weights.
        recurrence: its layers that keep a state beside the cache, if it has such.
        scheme: how `quantize_model` is to quantise it; None for not at all.
        chunk_sizes: positions of a chunk, for the layers whose attention ends at chunks.
        windows: the most positions that a token sees, for the layers that see only a part.
        asks_positions: whether its attention asks a cache for the positions of a step's tokens.
        stock_attention: the name of its own attention, by transformers.
        cuts: which parts of its linear layers this rank has, by the layers' names.
        known: what `reference_logits` has found.
    """

    model: PreTrainedModel
    layers: dict[int, LayerShape]
    device: torch.device
    dtype: torch.dtype
    recurrence: Recurrence | None = None
    scheme: quantization.Scheme | None = None
    chunk_sizes: dict[int, int] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    asks_positions: bool = False
    stock_attention: str = "eager"
    cuts: dict[str, Cut] = field(default_factory=dict)
    known: KnownLogits = field(default_factory=KnownLogits, compare=False, repr=False)

    def logits(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: Mapping[int, tuple[Tensor, Tensor]],
        batch: AttentionInput,
        backend: AttentionBackend,
        rows: Tensor | None = None,
        states: StepStates | None = None,
        images: ImageRows[Tensor] | None = None,
    ) -> Tensor:
        """Computes the tokens of a step.

        Args:
            input_ids: int64 [num_tokens].
            positions: likewise.
            caches: of each layer, by its index.
            batch: for attention.
            backend: computes attention.
            rows: int64 [num_rows], the tokens whose logits are wanted, in their order; None for
                all.
            states: of a model that keeps states beside the cache.
            images: of a step in which prompts have some.

        Returns:
            Logits [num_rows, vocab_size] in the model's own dtype.
        """
        options = {} if rows is None else {"logits_to_keep": rows}
        spans = () if images is None else images.spans
        step = AttentionStep(caches, batch, backend, self.chunk_sizes, self.windows, spans)
        tokens: dict[str, Tensor] = {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
        }
        if images is not None:
            tokens = image_part.arguments(self.model, input_ids, positions, images)
        with attending(step), self._remembering(states), image_part.adding(self.model, images):
            output = self.model(
                **tokens,
                use_cache=False,
                past_key_values=StepPositions(positions) if self.asks_positions else None,
                **options,
            )
        logits = output.logits
        assert isinstance(logits, Tensor)
        is_whole = rows is not None and logits.shape[1] != len(rows)  # a model may know no rows
        return logits[0, rows] if is_whole else logits[0]

    def _remembering(self, states: StepStates | None) -> AbstractContextManager[None]:
        if self.recurrence is None:
            return nullcontext()
        assert states is not None
        return self.recurrence.computing(states)

    def state_pool(self, num_slots: int) -> StatePool | None:
        """States of this many sequences, for a model that keeps any beside the KV cache."""
        if self.recurrence is None:
            return None
        return StatePool(self.recurrence.states, num_slots, self.device)
