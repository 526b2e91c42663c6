"""The step loop's body: schedule, pack, forward, sample, publish. It runs in one thread.

The caller feeds it with `add` and `abort` between steps. Nothing here waits for anybody.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .batch import ModelInput, pack
from .constraints import Constraints
from .errors import CapacityError, GrammarError
from .logits import RowMasks
from .request import EngineStats, Request, SequenceOutput, StepOutput, Token
from .sampler import prompt_logprobs, sample
from .scheduler import ScheduledBatch, Scheduler
from .sequence import DraftedSequence, SampledSequence, Sequence
from .watermark import Watermark

logger = logging.getLogger(__name__)

Forward = Callable[[ModelInput], Tensor]


class Engine:
    """Continuous batching over one model.

    Args:
        forward: computes logits for a packed batch: `ModelRunner.forward`, or a test's table.
        scheduler: decides what each step computes.
        device: where `forward` wants its input.
        vocab_size: token ids are below this.
        watermark: for requests that ask for one; without it they are refused.
        constraints: for requests with a grammar; without it they are refused.
    """

    def __init__(
        self,
        forward: Forward,
        scheduler: Scheduler,
        device: torch.device,
        *,
        vocab_size: int = 1 << 32,
        watermark: Watermark | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        self._forward = forward
        self._scheduler = scheduler
        self._device = device
        self._vocab_size = vocab_size
        self._watermark = watermark
        self._constraints = constraints
        self._sequences: dict[str, Sequence] = {}
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return self._scheduler.has_work

    def prepare(self, request: Request, done: Callable[[], object]) -> bool:
        """Makes ready what a request needs before `add`, in the background if it takes time.

        Returns:
            Whether it can be added now; if not, `done` is called later from another thread.
        """
        return self._constraints is None or self._constraints.prepare(request, done)

    def add(self, request: Request) -> SequenceOutput | None:
        """Queues a request.

        Returns:
            None, or the final output of a request that cannot be served.
        """
        if not request.prompt_token_ids:
            return _failed(request.request_id, "the prompt has no tokens")
        if max((*request.prompt_token_ids, *request.resumed_token_ids)) >= self._vocab_size:
            return _failed(request.request_id, f"a token id is not below {self._vocab_size}")
        if request.sampling.watermark and self._watermark is None:
            return _failed(request.request_id, "this engine has no watermark")
        if request.request_id in self._sequences:
            return _failed(request.request_id, "the request id is in use")
        if request.max_new_tokens <= len(request.resumed_token_ids):
            return _failed(request.request_id, "there is nothing left to generate")
        if request.grammar and self._constraints is None:
            return _failed(request.request_id, "this engine has no grammars")
        sequence = Sequence(request)
        try:
            self._scheduler.add(sequence)
            if request.grammar and self._constraints is not None:
                self._constraints.add(request)
        except CapacityError as error:
            return _failed(request.request_id, str(error))
        except GrammarError as error:
            self._scheduler.finish(sequence)
            return _failed(request.request_id, f"grammar: {error}")
        self._sequences[request.request_id] = sequence
        return None

    def abort(self, request_id: str) -> None:
        """Ends a request without an answer; its blocks are free before the next step."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.finish(sequence)
            if self._constraints is not None:
                self._constraints.drop(request_id)

    def step(self) -> StepOutput:
        """Computes one step for everybody who is in it."""
        started = time.perf_counter()
        batch = self._scheduler.schedule()
        if not batch.num_tokens:
            return StepOutput(stats=self.stats())
        num_prefill_tokens = batch.num_prefill_tokens
        try:
            outputs, forward_s, sample_s = self._compute(batch)
        except Exception:
            # Which row is to blame is not known, and memory may be short: the step's rows go, the
            # waiting ones and the engine stay.
            logger.exception("a step of %d sequences failed", len(batch.num_tokens))
            outputs = [self._fail(s, "the model failed on this batch") for s in batch.num_tokens]
            forward_s = sample_s = 0.0
        self._num_steps += 1
        return StepOutput(
            outputs=tuple(outputs),
            stats=self.stats(),
            num_scheduled_tokens=batch.total_tokens,
            num_prefill_tokens=num_prefill_tokens,
            forward_s=forward_s,
            sample_s=sample_s,
            duration_s=time.perf_counter() - started,
        )

    def stats(self) -> EngineStats:
        """A snapshot."""
        scheduler = self._scheduler
        return EngineStats(
            num_steps=self._num_steps,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_blocks=scheduler.blocks.num_free_blocks,
            num_blocks=scheduler.blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
        )

    def check_integrity(self) -> None:
        """Asserts that no block was lost or given twice."""
        self._scheduler.blocks.check_integrity([*self._scheduler.running, *self._scheduler.waiting])

    @torch.inference_mode()  # logits come from it, and filters write into them
    def _compute(self, batch: ScheduledBatch) -> tuple[list[SequenceOutput], float, float]:
        model_input = pack(batch, self._scheduler.blocks.block_size, self._device)
        rows = _sampled_rows(model_input)
        pending = self._constraints.start(rows) if self._constraints is not None else None
        started = time.perf_counter()
        logits = self._forward(model_input)
        forwarded = time.perf_counter()
        prompts = self._prompt_logprobs(logits, model_input)
        masks = None if pending is None else pending.wait(logits.device)
        tokens = self._sample(logits, model_input, rows, masks)
        sampled = time.perf_counter()
        self._scheduler.advance(batch)
        outputs = [
            output
            for sequence in batch.num_tokens
            for output in self._publish(
                sequence, tokens.get(sequence, []), prompts.get(sequence, ())
            )
        ]
        return outputs, forwarded - started, sampled - forwarded

    def _publish(
        self, sequence: Sequence, chosen: list[Token], logprobs: tuple[float | None, ...]
    ) -> list[SequenceOutput]:
        """What a step brought: no token, one, or more where guesses were right or one is forced."""
        output = SequenceOutput(
            request_id=sequence.request_id,
            prompt_logprobs=logprobs,
            first_scheduled=not sequence.started,
        )
        if not sequence.started:
            sequence.started = True
            self._num_prompt_tokens += sequence.num_prompt_tokens
            self._num_cached_tokens += sequence.num_cached_tokens
        if not chosen:
            return [output]
        try:
            if self._constraints is not None:  # before the logits: a dead end masks all of them
                self._constraints.check(sequence)
            if math.isnan(chosen[0].logprob):
                self._scheduler.blocks.forget(sequence)
                return [self._fail(sequence, "the model gave no valid logits")]
            tokens = self._append(sequence, chosen)
        except GrammarError as error:
            return [self._fail(sequence, f"grammar: {error}")]
        outputs = [replace(output, token=tokens[0])]
        outputs += [
            SequenceOutput(request_id=sequence.request_id, token=token) for token in tokens[1:]
        ]
        if sequence.finish_reason is not None:
            self.abort(sequence.request_id)
            outputs[-1] = replace(outputs[-1], finish_reason=sequence.finish_reason)
        return outputs

    def _append(self, sequence: Sequence, chosen: list[Token]) -> list[Token]:
        """Adds the tokens of a step, up to the sequence's end: the chosen ones, then forced ones.

        Raises:
            GrammarError: the sequence cannot go on.
        """
        tokens: list[Token] = []
        for token in chosen:
            tokens.append(token)
            if sequence.append(token.token_id) is not None:
                break
        self._scheduler.accept(sequence, len(tokens) - 1)
        if sequence.finish_reason is None and self._constraints is not None:
            for token_id in self._constraints.advance(sequence, tokens[-1].token_id):
                tokens.append(_certain(token_id, sequence))
                if sequence.append(token_id) is not None:
                    break
        self._num_generated_tokens += len(tokens)
        return tokens

    def _sample(
        self,
        logits: Tensor,
        model_input: ModelInput,
        sampled: list[SampledSequence],
        masks: RowMasks | None,
    ) -> dict[Sequence, list[Token]]:
        """The next tokens of each sequence: one, and one more for each guess that was right."""
        if not sampled:
            return {}
        if len(sampled) != logits.shape[0]:
            rows = [row for part in model_input.sampled.values() for row in part]
            logits = logits[torch.tensor(rows, device=logits.device)]
        tokens = iter(sample(logits, sampled, self._watermark, masks))
        return {
            sequence: _verified(list(itertools.islice(tokens, len(part))), sequence.draft_ids)
            for sequence, part in model_input.sampled.items()
        }

    def _prompt_logprobs(
        self, logits: Tensor, model_input: ModelInput
    ) -> dict[Sequence, tuple[float | None, ...]]:
        result: dict[Sequence, tuple[float | None, ...]] = {}
        for rows in model_input.prompt_rows:
            sequence = rows.sequence
            end = rows.start + len(rows.target_ids)
            values: list[float | None] = [
                *prompt_logprobs(logits[rows.start : end], rows.target_ids)
            ]
            known = sequence.num_computed_tokens + 1  # the first target's place in the prompt
            if known == 1:
                values.insert(0, None)
                known = 0
            new = values[max(0, sequence.num_prompt_logprobs - known) :]
            sequence.num_prompt_logprobs += len(new)
            result[sequence] = tuple(new)
        return result

    def _fail(self, sequence: Sequence, reason: str) -> SequenceOutput:
        self.abort(sequence.request_id)
        return _failed(sequence.request_id, reason)


def _sampled_rows(model_input: ModelInput) -> list[SampledSequence]:
    """Whose token each sampled row gives."""
    return [
        DraftedSequence(sequence, num_drafts) if num_drafts else sequence
        for sequence, part in model_input.sampled.items()
        for num_drafts in range(len(part))
    ]


def _verified(tokens: list[Token], draft_ids: list[int]) -> list[Token]:
    """The tokens up to the first that is not what was guessed: later rows saw a wrong text."""
    num_right = 0
    for token, guess in zip(tokens, draft_ids, strict=False):
        if token.token_id != guess or math.isnan(tokens[num_right + 1].logprob):
            break
        num_right += 1
    return tokens[: num_right + 1]


def _certain(token_id: int, sequence: Sequence) -> Token:
    """A token that nothing else could have been: its probability is 1."""
    top = ((token_id, 0.0),) if sequence.request.sampling.top_n_tokens else ()
    return Token(token_id, 0.0, top)


def _failed(request_id: str, reason: str) -> SequenceOutput:
    return SequenceOutput(request_id=request_id, error=reason)
