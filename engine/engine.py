"""The body of the step loop: schedule, pack, forward, sample, publish. It runs in one thread.

The caller calls `add` and `abort` between steps. Nothing here waits for a request or a connection.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch

from .adapters.bank import AdapterBank
from .executor import Executor, Forward, LaunchedStep, PromptResult, no_replays
from .grammar.constraints import Constraints
from .heartbeat import Activity, Phase
from .images.step_images import StepImages
from .protocol.errors import CapacityError, GrammarError
from .protocol.request import EngineStats, MomentKind, Request, SequenceOutput, StepOutput, Token
from .sampling.watermark import Watermark
from .scheduling.scheduler import Scheduler
from .scheduling.sequence import Sequence, SequenceStatus

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model.

    Args:
        forward: computes logits for a packed batch: `ModelRunner.forward`, or a fake.
        scheduler: decides what each step computes.
        device: where `forward` expects its input.
        vocab_size: token ids are below this.
        max_total_tokens: of a sequence; the model may have no positions beyond it.
        watermark: for requests that ask for one; without it they are refused.
        constraints: for requests with a grammar; without it they are refused.
        adapters: for requests with an adapter; without it they are refused.
        images: for requests with images; without it they are refused.
        runs_ahead: whether a step is launched before the tokens of the previous one are read. The
            device then never waits for the host; one token too many is computed for a sequence that
            ends, and is dropped.
        leads_ranks: whether `forward` is one of several ranks', which takes its input on the host
            and puts the tokens of the previous step into it.
        num_replays: how many steps `forward` has replayed from recordings so far.
        activity: where a step notes that it waits for the device.
    """

    def __init__(
        self,
        forward: Forward,
        scheduler: Scheduler,
        device: torch.device,
        *,
        vocab_size: int = 1 << 32,
        max_total_tokens: int = 1 << 32,
        watermark: Watermark | None = None,
        constraints: Constraints | None = None,
        adapters: AdapterBank | None = None,
        images: StepImages | None = None,
        runs_ahead: bool = False,
        leads_ranks: bool = False,
        num_replays: Callable[[], int] = no_replays,
        activity: Activity | None = None,
    ) -> None:
        self._executor = Executor(
            forward,
            device,
            scheduler.blocks.block_size,
            watermark,
            constraints,
            scheduler.blocks.form,
            images,
            leaves_placeholders=leads_ranks,
            num_replays=num_replays,
        )
        self._scheduler = scheduler
        self._runs_ahead = runs_ahead
        self._activity = activity or Activity()
        self._ahead: LaunchedStep | None = None
        self._vocab_size = vocab_size
        self._max_total_tokens = max_total_tokens
        self._watermark = watermark
        self._constraints = constraints
        self._takes_images = images is not None
        self.adapters = adapters
        self._sequences: dict[str, Sequence] = {}
        self._num_steps = 0
        self._num_replayed_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._release_s = 0.0  # see StepOutput, of the step that is being collected
        self._has_failed = False  # likewise

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return self._ahead is not None or self._scheduler.has_work

    def prepare(self, request: Request, done: Callable[[], object]) -> bool:
        """Compiles the grammar of a request before `add`, in the background if it takes time.

        Also waits for its adapter, where that is being loaded again.

        Returns:
            Whether the request can be added now; if not, `done` is called later, perhaps from
            another thread; then it is to be prepared again.
        """
        if self.adapters is not None and self.adapters.wait(request.adapter, done):
            return False
        return self._constraints is None or self._constraints.prepare(request, done)

    def add(self, request: Request) -> SequenceOutput | None:
        """Queues a request.

        Returns:
            None, or the final output of a request that cannot be served.
        """
        reason = self._refusal(request)
        if reason is not None:
            return _failed(request.request_id, reason)
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
        if request.adapter and self.adapters is not None:
            self.adapters.use(request.adapter)
        return None

    def abort(self, request_id: str) -> None:
        """Ends a request without an answer; its blocks are free before the next step."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.finish(sequence)
            if self._constraints is not None:
                self._constraints.drop(request_id)
            if sequence.request.adapter and self.adapters is not None:
                self.adapters.leave(sequence.request.adapter)

    def step(self) -> StepOutput:
        """Computes one step and returns the outputs of its sequences.

        When running ahead, the next step is launched before this one's tokens are read.

        Raises:
            AcceleratorError: this process cannot use the device any more: after an illegal access
                or a failed assertion all its later calls fail.
        """
        started = time.perf_counter()
        was_ahead = self._ahead is not None
        step, self._ahead = self._ahead or self._launch(None), None
        if step is None:
            return StepOutput(stats=self.stats(), moments=self._scheduler.moments.take())
        if self._runs_ahead and step.can_run_ahead:
            self._ahead = self._launch(step)
        collecting, self._release_s = time.perf_counter(), 0.0
        outputs = self._collect(step)
        ended = time.perf_counter()
        self._num_steps += 1
        self._num_replayed_steps += step.is_replayed
        if not (was_ahead or self._ahead or step.num_prefill_tokens or self._has_failed):
            self._scheduler.observe(step.batch, ended - started)
        return StepOutput(
            outputs=tuple(outputs),
            stats=self.stats(),
            num_scheduled_tokens=step.batch.total_tokens,
            num_prefill_tokens=step.num_prefill_tokens,
            forward_s=step.forward_s,
            sample_s=step.sample_s,
            duration_s=ended - started,
            moments=self._scheduler.moments.take(),
            num_seqs=len(step.batch.num_tokens),
            num_started_seqs=step.batch.num_started,
            schedule_s=step.batch.schedule_s,
            collect_s=ended - collecting,
            release_s=self._release_s,
            has_failed=self._has_failed,
            is_replayed=step.is_replayed,
        )

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
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
            max_running_tokens=scheduler.max_running_tokens,
            num_replayed_steps=self._num_replayed_steps,
        )

    def check_integrity(self) -> None:
        """Asserts that no block was lost or allocated twice."""
        self._scheduler.blocks.check_integrity([*self._scheduler.running, *self._scheduler.waiting])

    def _refusal(self, request: Request) -> str | None:
        """Why a request cannot be served by this engine; None if it can."""
        if not request.prompt_token_ids:
            return "the prompt has no tokens"
        if max((*request.prompt_token_ids, *request.resumed_token_ids)) >= self._vocab_size:
            return f"a token id is not below {self._vocab_size}"
        if any(token_id >= self._vocab_size for token_id, _ in request.sampling.logit_bias):
            return f"a token id of the logit bias is not below {self._vocab_size}"
        if request.sampling.watermark and self._watermark is None:
            return "this engine has no watermark"
        if request.adapter and (self.adapters is None or not self.adapters.has(request.adapter)):
            return "the adapter is not loaded any more"
        if request.request_id in self._sequences:
            return "the request id is in use"
        if request.max_new_tokens <= len(request.resumed_token_ids):
            return "there is nothing left to generate"
        if request.images and not self._takes_images:
            return "this engine takes no images"
        if request.images and request.images[-1].end > len(request.prompt_token_ids):
            return "an image has placeholders behind the prompt"
        if request.grammar and self._constraints is None:
            return "this engine has no grammars"
        num_tokens = len(request.prompt_token_ids) + request.max_new_tokens
        if num_tokens > self._max_total_tokens:
            limit = self._max_total_tokens
            return f"{num_tokens} tokens are more than max_total_tokens, which is {limit}"
        return None

    def _launch(self, previous: LaunchedStep | None) -> LaunchedStep | None:
        """Launches the next step; None if there is nothing to compute.

        `previous` is a running step whose tokens are not read yet. Each of its sequences has one
        row: those with draft tokens do not run ahead.
        """
        if previous is not None:
            for row, sequence in enumerate(previous.drafts):
                if sequence.status is not SequenceStatus.FINISHED:
                    sequence.append_placeholder(row)
        batch = self._scheduler.schedule()
        if not batch.num_tokens:
            return None
        step = self._executor.launch(batch, previous)
        if not step.has_failed:
            self._scheduler.advance(step.batch)
        return step

    def _collect(self, step: LaunchedStep) -> list[SequenceOutput]:
        """Waits for a step, and returns the outputs of the sequences that still run.

        Raises:
            AcceleratorError: this process cannot use the device any more.
        """
        refused = [
            self._fail(sequence, reason)
            for sequence, reason in step.refused.items()
            if sequence.status is not SequenceStatus.FINISHED
        ]
        unfinished = [s for s in step.batch.num_tokens if s.status is not SequenceStatus.FINISHED]
        self._activity.begin(Phase.WAITING_FOR_DEVICE)
        try:
            result = None if step.has_failed else step.wait()
        except torch.AcceleratorError:
            raise
        except Exception:  # an error on the device, which is raised only here
            logger.exception("a step of %d sequences failed", len(step.batch.num_tokens))
            result = None
        self._activity.begin(Phase.COMPUTING)
        self._has_failed = result is None
        if result is None:
            reason = "the model failed on this batch"
            return refused + [self._fail(s, reason) for s in unfinished]
        return refused + [
            output
            for sequence in unfinished
            for output in self._publish(
                sequence,
                result.tokens.get(sequence, []),
                result.prompts.get(sequence, PromptResult()),
            )
        ]

    def _publish(
        self, sequence: Sequence, chosen: list[Token], prompt: PromptResult
    ) -> list[SequenceOutput]:
        """The outputs of a sequence for a step.

        There is one without a token while the prompt is computed, otherwise one for each token:
        several where draft tokens were accepted or a grammar forces tokens.
        """
        is_first = not sequence.started
        if is_first:
            sequence.started = True
            self._num_prompt_tokens += sequence.num_prompt_tokens
            self._num_cached_tokens += sequence.num_cached_tokens
        tokens: list[Token | None] = [None]
        if chosen:
            try:
                if (constraints := self._constraints_of(sequence)) is not None:
                    constraints.check(sequence)  # first: a grammar's dead end masks all logits
                if math.isnan(chosen[0].logprob):
                    return [self._fail(sequence, "the model gave no valid logits")]
                tokens = [*self._append(sequence, chosen)]
            except GrammarError as error:
                return [self._fail(sequence, f"grammar: {error}")]
        last = len(tokens) - 1
        outputs = [
            SequenceOutput(
                request_id=sequence.request_id,
                token=token,
                finish_reason=sequence.finish_reason if index == last else None,
                prompt_logprobs=() if index else prompt.logprobs,
                prompt_tops=() if index else prompt.tops,
                first_scheduled=is_first and not index,
                num_cached_tokens=sequence.num_cached_tokens if is_first and not index else 0,
            )
            for index, token in enumerate(tokens)
        ]
        if sequence.finish_reason is not None:
            self._scheduler.moments.note(sequence.request_id, MomentKind.FINISHED)
            self._release(sequence)
        return outputs

    def _release(self, sequence: Sequence) -> None:
        """Takes a sequence that has ended out of the batch."""
        started = time.perf_counter()
        self.abort(sequence.request_id)
        self._release_s += time.perf_counter() - started

    def _append(self, sequence: Sequence, chosen: list[Token]) -> list[Token]:
        """Appends the tokens of a step, up to the sequence's end: sampled, then forced ones.

        Raises:
            GrammarError: the sequence cannot go on.
        """
        tokens: list[Token] = []
        for token in chosen:
            tokens.append(token)
            if sequence.append(token.token_id) is not None:
                break
        num_before = sequence.num_generated_tokens - len(tokens)
        if num_before == len(sequence.request.resumed_token_ids):
            self._scheduler.moments.note(sequence.request_id, MomentKind.FIRST_TOKEN)
        self._scheduler.accept(sequence, len(tokens) - 1)
        constraints = self._constraints_of(sequence)
        if sequence.finish_reason is None and constraints is not None:
            for token_id in constraints.advance(sequence, tokens[-1].token_id):
                tokens.append(_forced_token(token_id, sequence))
                if sequence.append(token_id) is not None:
                    break
        self._num_generated_tokens += len(tokens)
        return tokens

    def _constraints_of(self, sequence: Sequence) -> Constraints | None:
        return self._constraints if sequence.request.grammar else None

    def _fail(self, sequence: Sequence, reason: str) -> SequenceOutput:
        self._scheduler.blocks.forget(sequence)  # their content may be wrong
        self.abort(sequence.request_id)
        return _failed(sequence.request_id, reason)


def _forced_token(token_id: int, sequence: Sequence) -> Token:
    """The only token that a grammar allows: its probability is 1."""
    top = ((token_id, 0.0),) if sequence.request.sampling.top_n_tokens else ()
    return Token(token_id, 0.0, top)


def _failed(request_id: str, reason: str) -> SequenceOutput:
    return SequenceOutput(request_id=request_id, error=reason)
