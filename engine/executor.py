"""Launches a batch on the device, and reads the sampled tokens later.

    ScheduledBatch --launch--> LaunchedStep --wait--> StepResult

Between the two the device computes and the host is free, for example to launch the next step.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .batch.model_input import ModelInput, PromptRows
from .batch.packing import pack
from .block_form import BlockForm
from .grammar.constraints import Constraints
from .images.step_images import StepImages
from .protocol.request import Token
from .sampling.sampler import SampledTokens, prompt_logprobs, prompt_tops, sample
from .sampling.watermark import Watermark
from .scheduling.scheduler import ScheduledBatch
from .scheduling.sequence import DraftedSequence, SampledSequence, Sequence
from .transfer import Download, upload

logger = logging.getLogger(__name__)

Forward = Callable[[ModelInput], Tensor]


def no_replays() -> int:
    """The count of a forward pass of which nothing is recorded."""
    return 0


class PromptResult(NamedTuple):
    """Log-probabilities of a prompt's tokens, and the likeliest tokens at each if asked for."""

    logprobs: tuple[float | None, ...] = ()
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of a step: the next tokens of sequences, and what it tells of prompts."""

    tokens: dict[Sequence, list[Token]] = field(default_factory=dict)
    prompts: dict[Sequence, PromptResult] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedStep:
    """A step on the device.

    Attributes:
        batch: what it computes.
        num_prefill_tokens: tokens of the sequences in the batch that do not decode.
        drafts: for each sequence that gets tokens, in the order of `tokens`, the draft tokens that
            the step verifies. It gets one token more than are accepted.
        tokens: what is sampled, a row for each draft token and one more for each sequence.
        end: a copy to wait for instead, in a step that samples nothing.
        prompts: the log-probabilities of prompts.
        forward_s: seconds of the host; on a GPU the device computes on afterwards.
        sample_s: likewise.
        is_replayed: whether the forward pass was replayed from a recording.
        has_failed: whether the launch failed, so that there is nothing to wait for.
        refused: sequences that were taken out of the batch, and why.
    """

    batch: ScheduledBatch
    num_prefill_tokens: int
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    tokens: SampledTokens | None = None
    end: Download | None = None
    prompts: list[_PromptLogprobs] = field(default_factory=list)
    forward_s: float = 0.0
    sample_s: float = 0.0
    is_replayed: bool = False
    has_failed: bool = False
    refused: dict[Sequence, str] = field(default_factory=dict)

    @property
    def can_run_ahead(self) -> bool:
        """Whether the next step can be planned without knowing this one's tokens."""
        return not self.has_failed and not any(s.needs_sampled_tokens for s in self.drafts)

    def wait(self) -> StepResult:
        """Waits for the device and returns the results."""
        if self.end is not None:
            self.end.wait()
        tokens = iter(self.tokens.wait() if self.tokens is not None else ())
        return StepResult(
            tokens={
                sequence: _verified(list(itertools.islice(tokens, 1 + len(drafts))), drafts)
                for sequence, drafts in self.drafts.items()
            },
            prompts={part.sequence: part.wait() for part in self.prompts},
        )


class Executor:
    """Runs batches on one device.

    Args:
        forward: computes logits of any dtype for a packed batch: `ModelRunner.forward`, or a fake.
        device: where `forward` expects its input.
        block_size: tokens per block of the KV cache.
        watermark: for requests that ask for one.
        constraints: for requests with a grammar.
        form: of the cache's blocks, where layers with a window have their own.
        images: for requests with images.
        leaves_placeholders: whether `forward` puts the previous step's tokens into their places.
        num_replays: how many steps `forward` has replayed from recordings so far.
    """

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        block_size: int,
        watermark: Watermark | None = None,
        constraints: Constraints | None = None,
        form: BlockForm | None = None,
        images: StepImages | None = None,
        *,
        leaves_placeholders: bool = False,
        num_replays: Callable[[], int] = no_replays,
    ) -> None:
        self._leaves_placeholders = leaves_placeholders
        self._num_replays = num_replays
        self._form = form
        self._forward = forward
        self._device = device
        self._block_size = block_size
        self._watermark = watermark
        self._constraints = constraints
        self._images = images

    def launch(self, batch: ScheduledBatch, previous: LaunchedStep | None = None) -> LaunchedStep:
        """Computes a batch on the CPU, or starts to compute it on a GPU.

        Args:
            batch: what the step computes.
            previous: the step whose sampled tokens this one continues before the host reads them.

        Returns:
            The step; if anything went wrong, one with `has_failed`.

        Raises:
            AcceleratorError: this process cannot use the device any more.
        """
        try:
            refused = self._prepare(batch)
            if refused:
                kept = {s: n for s, n in batch.num_tokens.items() if s not in refused}
                batch = replace(batch, num_tokens=kept)
            if not batch.num_tokens:
                return LaunchedStep(batch=batch, num_prefill_tokens=0, refused=refused)
            return replace(self._launch(batch, previous), refused=refused)
        except torch.AcceleratorError:
            raise
        except Exception:
            # Which sequence caused it is not known, and memory may be short: all sequences of this
            # step fail; the waiting ones and the engine go on.
            logger.exception("a step of %d sequences failed", len(batch.num_tokens))
            return LaunchedStep(batch=batch, num_prefill_tokens=0, has_failed=True)

    def _prepare(self, batch: ScheduledBatch) -> dict[Sequence, str]:
        return {} if self._images is None else self._images.prepare(batch)

    @torch.inference_mode()
    def forward(self, batch: ScheduledBatch) -> Tensor:
        """Computes the logits of a batch, in the model's dtype, without sampling from them."""
        return self._forward(pack(batch, self._block_size, self._device, form=self._form))

    @torch.inference_mode()  # logits come from it, and filters write into them
    def _launch(self, batch: ScheduledBatch, previous: LaunchedStep | None) -> LaunchedStep:
        num_prefill_tokens = batch.num_prefill_tokens
        sampled_ids = None if previous is None or previous.tokens is None else previous.tokens.ids
        model_input = pack(batch, self._block_size, self._device, form=self._form)
        if sampled_ids is not None:
            model_input = replace(model_input, previous=sampled_ids)
            if not self._leaves_placeholders:
                model_input = model_input.filled(sampled_ids)
        if self._images is not None:
            images = self._images.rows(batch, model_input.positions)
            model_input = replace(model_input, images=images)
        rows = _sampled_rows(model_input)
        pending = self._constraints.start(rows) if self._constraints is not None else None
        num_replays = self._num_replays()
        started = time.perf_counter()
        logits = self._forward(model_input).float()
        forwarded = time.perf_counter()
        prompts = [_begin_prompt(logits, part) for part in model_input.prompt_rows]
        masks = None if pending is None else pending.wait(logits.device)
        tokens = end = None
        if rows:
            chosen = logits if len(rows) == len(logits) else _rows_of(logits, model_input)
            tokens = sample(chosen, rows, self._watermark, masks, sampled_ids)
        else:  # only chunks of prompts: without a wait, steps would queue up on the device
            end = Download(logits[:1, :1])
        return LaunchedStep(
            batch=batch,
            num_prefill_tokens=num_prefill_tokens,
            drafts={sequence: sequence.draft_ids for sequence in model_input.sampled},
            tokens=tokens,
            end=end,
            prompts=prompts,
            forward_s=forwarded - started,
            sample_s=time.perf_counter() - forwarded,
            is_replayed=self._num_replays() > num_replays,
        )


@dataclass(frozen=True, slots=True)
class _PromptLogprobs:
    """Log-probabilities of a prompt's tokens, being copied; the first `skip` are reported already.

    `is_first` says that they are of the beginning of the prompt.
    """

    sequence: Sequence
    values: Download
    tops: Download | None
    is_first: bool
    skip: int

    def wait(self) -> PromptResult:
        """Those not reported yet; that of a prompt's first token is None."""
        values: list[float | None] = [*self.values.wait().tolist()]
        tops = [] if self.tops is None else [_pairs(row) for row in self.tops.wait().tolist()]
        if self.is_first:
            values.insert(0, None)
            if self.tops is not None:
                tops.insert(0, ())
        return PromptResult(tuple(values[self.skip :]), tuple(tops[self.skip :]))


def _pairs(row: list[list[float]]) -> tuple[tuple[int, float], ...]:
    """Ids with their log-probabilities; none of probability 0."""
    ids, logprobs = row
    found = zip(ids, logprobs, strict=True)
    return tuple((int(token_id), logprob) for token_id, logprob in found if logprob > -math.inf)


def _begin_prompt(logits: Tensor, rows: PromptRows) -> _PromptLogprobs:
    sequence = rows.sequence
    end = rows.start + len(rows.target_ids)
    chosen = logits[rows.start : end]
    values = prompt_logprobs(chosen, rows.target_ids)
    top_n = sequence.request.prompt_top_n
    tops = prompt_tops(chosen, top_n) if top_n else None
    is_first = sequence.num_computed_tokens == 0
    first = 0 if is_first else sequence.num_computed_tokens + 1  # the first value's position
    num_values = len(rows.target_ids) + is_first
    skip = min(max(0, sequence.num_prompt_logprobs - first), num_values)
    sequence.num_prompt_logprobs += num_values - skip
    return _PromptLogprobs(sequence, values, tops, is_first, skip)


def _sampled_rows(model_input: ModelInput) -> list[SampledSequence]:
    """The sequence of each sampled row, with the draft tokens that precede the row's token."""
    return [
        DraftedSequence(sequence, num_drafts) if num_drafts else sequence
        for sequence, part in model_input.sampled.items()
        for num_drafts in range(len(part))
    ]


def _rows_of(logits: Tensor, model_input: ModelInput) -> Tensor:
    """The logits that tokens are sampled from, without those that only a prompt needs."""
    rows = [row for part in model_input.sampled.values() for row in part]
    return logits[upload(rows, logits.device)]


def _verified(tokens: list[Token], draft_ids: list[int]) -> list[Token]:
    """The tokens up to the first that differs from its draft: later rows had a wrong context."""
    num_accepted = 0
    for token, draft_id in zip(tokens, draft_ids, strict=False):
        if token.token_id != draft_id or math.isnan(tokens[num_accepted + 1].logprob):
            break
        num_accepted += 1
    return tokens[: num_accepted + 1]
