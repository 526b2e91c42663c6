"""Puts a batch onto the device, and takes the tokens off it later.

    ScheduledBatch --launch--> LaunchedStep --wait--> StepResult

Between the two the device works and the host is free, among other things to launch the next step.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batch import ModelInput, PromptRows, pack
from .grammar.constraints import Constraints
from .protocol.request import Token
from .sampling.sampler import SampledTokens, prompt_logprobs, sample
from .sampling.watermark import Watermark
from .scheduling.scheduler import ScheduledBatch
from .scheduling.sequence import DraftedSequence, SampledSequence, Sequence
from .transfer import Download, upload

logger = logging.getLogger(__name__)

Forward = Callable[[ModelInput], Tensor]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed: the next tokens of sequences, and log-probabilities of prompts."""

    tokens: dict[Sequence, list[Token]] = field(default_factory=dict)
    prompt_logprobs: dict[Sequence, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedStep:
    """A step on the device.

    `sampled` says how many tokens each sequence gets at most, in the order of `tokens`; a step
    without tokens has an `end` to wait for. Durations are seconds of the host: on a GPU the device
    goes on afterwards.
    """

    batch: ScheduledBatch
    num_prefill_tokens: int
    sampled: dict[Sequence, int] = field(default_factory=dict)
    tokens: SampledTokens | None = None
    end: Download | None = None
    prompts: list[_PromptLogprobs] = field(default_factory=list)
    forward_s: float = 0.0
    sample_s: float = 0.0
    has_failed: bool = False

    @property
    def can_run_ahead(self) -> bool:
        """Whether the next step can be planned without knowing this one's tokens."""
        return not self.has_failed and not any(s.needs_sampled_tokens for s in self.sampled)

    def wait(self) -> StepResult:
        """What was computed, once the device is done with it."""
        if self.end is not None:
            self.end.wait()
        tokens = iter(self.tokens.wait() if self.tokens is not None else ())
        return StepResult(
            tokens={
                sequence: _verified(list(itertools.islice(tokens, count)), sequence.draft_ids)
                for sequence, count in self.sampled.items()
            },
            prompt_logprobs={part.sequence: part.wait() for part in self.prompts},
        )


class Executor:
    """Runs batches on one device.

    Args:
        forward: computes logits of any format for a packed batch: `ModelRunner.forward`, or a
            test's table.
        device: where `forward` wants its input.
        block_size: tokens per block of the KV cache.
        watermark: for requests that ask for one.
        constraints: for requests with a grammar.
    """

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        block_size: int,
        watermark: Watermark | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        self._forward = forward
        self._device = device
        self._block_size = block_size
        self._watermark = watermark
        self._constraints = constraints

    def launch(self, batch: ScheduledBatch, previous: LaunchedStep | None = None) -> LaunchedStep:
        """Computes a batch, or begins to.

        Args:
            batch: the step's work.
            previous: the step whose tokens this one continues without the host knowing them.

        Returns:
            The step; one that has failed if anything went wrong.

        Raises:
            AcceleratorError: the device cannot be used any more; only a new process can.
        """
        try:
            return self._launch(batch, previous)
        except torch.AcceleratorError:
            raise
        except Exception:
            # Which row is to blame is not known, and memory may be short: the step's rows go, the
            # waiting ones and the engine stay.
            logger.exception("a step of %d sequences failed", len(batch.num_tokens))
            return LaunchedStep(batch=batch, num_prefill_tokens=0, has_failed=True)

    @torch.inference_mode()
    def forward(self, batch: ScheduledBatch) -> Tensor:
        """The logits of a batch as the model gives them, of which no token is chosen."""
        return self._forward(pack(batch, self._block_size, self._device))

    @torch.inference_mode()  # logits come from it, and filters write into them
    def _launch(self, batch: ScheduledBatch, previous: LaunchedStep | None) -> LaunchedStep:
        num_prefill_tokens = batch.num_prefill_tokens
        known = None if previous is None or previous.tokens is None else previous.tokens.ids
        model_input = pack(batch, self._block_size, self._device, known)
        rows = _sampled_rows(model_input)
        pending = self._constraints.start(rows) if self._constraints is not None else None
        started = time.perf_counter()
        logits = self._forward(model_input).float()
        forwarded = time.perf_counter()
        prompts = [_begin_prompt(logits, part) for part in model_input.prompt_rows]
        masks = None if pending is None else pending.wait(logits.device)
        tokens = end = None
        if rows:
            chosen = logits if len(rows) == len(logits) else _rows_of(logits, model_input)
            tokens = sample(chosen, rows, self._watermark, masks)
        else:  # a part of a prompt: many of them could pile up on the device, and others behind
            end = Download(model_input.input_ids[:1])
        return LaunchedStep(
            batch=batch,
            num_prefill_tokens=num_prefill_tokens,
            sampled={sequence: len(part) for sequence, part in model_input.sampled.items()},
            tokens=tokens,
            end=end,
            prompts=prompts,
            forward_s=forwarded - started,
            sample_s=time.perf_counter() - forwarded,
        )


@dataclass(frozen=True, slots=True)
class _PromptLogprobs:
    """Log-probabilities of a prompt's tokens, on their way; `skip` of them were reported before."""

    sequence: Sequence
    values: Download
    is_first: bool
    skip: int

    def wait(self) -> tuple[float | None, ...]:
        """The new ones; the first token of a prompt has none."""
        values: list[float | None] = [*self.values.wait().tolist()]
        if self.is_first:
            values.insert(0, None)
        return tuple(values[self.skip :])


def _begin_prompt(logits: Tensor, rows: PromptRows) -> _PromptLogprobs:
    sequence = rows.sequence
    end = rows.start + len(rows.target_ids)
    values = prompt_logprobs(logits[rows.start : end], rows.target_ids)
    is_first = sequence.num_computed_tokens == 0
    first = 0 if is_first else sequence.num_computed_tokens + 1  # the first value's place
    num_values = len(rows.target_ids) + is_first
    skip = min(max(0, sequence.num_prompt_logprobs - first), num_values)
    sequence.num_prompt_logprobs += num_values - skip
    return _PromptLogprobs(sequence, values, is_first, skip)


def _sampled_rows(model_input: ModelInput) -> list[SampledSequence]:
    """Whose token each sampled row gives."""
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
    """The tokens up to the first that is not what was guessed: later rows saw a wrong text."""
    num_right = 0
    for token, guess in zip(tokens, draft_ids, strict=False):
        if token.token_id != guess or math.isnan(tokens[num_right + 1].logprob):
            break
        num_right += 1
    return tokens[: num_right + 1]
