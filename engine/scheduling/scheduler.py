"""Which sequences compute how many tokens in the next step.

One rule for everything: every running sequence has pending tokens (one while it decodes, the rest
of its prompt while it prefills) and gets as many of them as the step's token budget leaves. So
chunked prefill, prefix hits and recomputation after a preemption need no code of their own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..protocol.errors import CapacityError
from .block_manager import BlockManager
from .prompt_lookup import Drafter
from .sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """Tokens to compute in a step, by sequence, in the order of the rows."""

    num_tokens: dict[Sequence, int]

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.num_tokens.values())

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of those sequences that are not decoding."""
        return sum(n for sequence, n in self.num_tokens.items() if sequence.num_pending_tokens > 1)


@dataclass(slots=True)
class StepBudget:
    """What the step that is being planned has room for.

    Attributes:
        tokens: tokens of any kind.
        chunk_tokens: of these, tokens of prompts.
        logprob_rows: of these, tokens of prompts whose log-probabilities are wanted.
    """

    tokens: int
    chunk_tokens: int
    logprob_rows: int


class Scheduler:
    """First come, first served, under a token budget.

    Args:
        blocks: the allocator of the KV cache's blocks.
        max_step_tokens: the most tokens computed in one step.
        max_chunk_tokens: of these, the most tokens of prompts in a step that also decodes: decoding
            sequences get their next tokens only when such a step ends. None sets no extra bound.
        max_num_seqs: the most sequences running at the same time.
        max_logprob_rows: the most tokens per step of prompts whose log-probabilities are wanted:
            each such row takes memory for the logits of a whole vocabulary.
        max_draft_tokens: the most draft tokens of a decoding sequence that a step verifies; 0
            switches speculation off.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_step_tokens: int,
        max_num_seqs: int,
        max_chunk_tokens: int | None = None,
        max_logprob_rows: int = 256,
        max_draft_tokens: int = 0,
    ) -> None:
        self.blocks = blocks
        self.max_step_tokens = max_step_tokens
        self.max_chunk_tokens = max_chunk_tokens or max_step_tokens
        self.max_num_seqs = min(max_num_seqs, max_step_tokens)  # each needs a token per step
        self.max_logprob_rows = max_logprob_rows
        self.max_draft_tokens = max_draft_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            CapacityError: it would not fit into the cache even alone.
        """
        # The last token is returned but never computed, so it needs no slot.
        num_blocks = self.blocks.num_blocks_for(sequence.max_tokens - 1)
        if num_blocks > self.blocks.num_blocks:
            raise CapacityError(
                f"{sequence.max_tokens} tokens do not fit into a KV cache of "
                f"{self.blocks.num_blocks * self.blocks.block_size}"
            )
        if self.max_draft_tokens and not sequence.request.grammar:
            sequence.drafter = Drafter(self.max_draft_tokens)
        self.waiting.append(sequence)

    def schedule(self) -> ScheduledBatch:
        """Plans a step: running sequences first, then as many waiting ones as fit."""
        any_decoding = any(sequence.num_pending_tokens == 1 for sequence in self.running)
        budget = StepBudget(
            tokens=self.max_step_tokens,
            chunk_tokens=self.max_chunk_tokens if any_decoding else self.max_step_tokens,
            logprob_rows=self.max_logprob_rows,
        )
        planned: dict[Sequence, int] = {}
        self._plan_running(budget, planned)
        self._plan_waiting(budget, planned)
        return ScheduledBatch(planned)

    def advance(self, batch: ScheduledBatch) -> None:
        """Counts a launched step's tokens as computed: later steps run after it on the device."""
        for sequence, num_tokens in batch.num_tokens.items():
            sequence.num_computed_tokens += num_tokens - len(sequence.draft_ids)
            self.blocks.commit(sequence)

    def accept(self, sequence: Sequence, num_drafts: int) -> None:
        """Counts the accepted draft tokens of a sequence as computed, and drops the others.

        The cache has the keys and values of all of them already; later steps overwrite those of the
        rejected ones.

        Args:
            sequence: it has its tokens of the step.
            num_drafts: how many of the step's draft tokens are among them.
        """
        if sequence.drafter is not None and sequence.draft_ids:
            sequence.drafter.report(len(sequence.draft_ids), num_drafts)
        sequence.draft_ids = []
        sequence.num_computed_tokens += num_drafts
        self.blocks.commit(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence, whether it runs or waits; its blocks are free at once."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        (self.running if sequence.status is SequenceStatus.RUNNING else self.waiting).remove(
            sequence
        )
        sequence.status = SequenceStatus.FINISHED
        self.blocks.free(sequence)

    def _plan_running(self, budget: StepBudget, planned: dict[Sequence, int]) -> None:
        """Adds running sequences to the plan, the oldest first, and takes them off the budget."""
        for sequence in list(self.running):
            if budget.tokens == 0:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted earlier in this loop, in favour of an older sequence
            num_tokens = self._take(sequence, budget)
            if num_tokens and self._make_room(sequence, num_tokens, planned):
                num_tokens += self._draft(sequence, budget.tokens - num_tokens)
                planned[sequence] = num_tokens
                budget.tokens -= num_tokens

    def _plan_waiting(self, budget: StepBudget, planned: dict[Sequence, int]) -> None:
        """Starts waiting sequences in their order, as long as there is room for the next one."""
        while self.waiting and budget.tokens and len(self.running) < self.max_num_seqs:
            num_tokens = self._admit(self.waiting[0], budget)
            if not num_tokens:
                break  # smaller requests do not overtake, or a large one would starve
            sequence = self.waiting.popleft()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            planned[sequence] = num_tokens
            budget.tokens -= num_tokens

    def _take(self, sequence: Sequence, budget: StepBudget) -> int:
        """How many of its pending tokens a sequence gets.

        A prompt's tokens are taken off the budget here, except from `budget.tokens`, which the
        caller does when the sequence is planned.
        """
        if sequence.num_pending_tokens <= 1:
            return min(sequence.num_pending_tokens, budget.tokens)
        num_tokens = min(sequence.num_pending_tokens, budget.tokens, budget.chunk_tokens)
        if sequence.request.prompt_logprobs:
            num_tokens = min(num_tokens, budget.logprob_rows)
            budget.logprob_rows -= num_tokens
        budget.chunk_tokens -= num_tokens
        return num_tokens

    def _draft(self, sequence: Sequence, max_tokens: int) -> int:
        """Proposes draft tokens for a decoding sequence; returns how many.

        They get spare blocks only: every running sequence keeps one in reserve.
        """
        sequence.draft_ids = []
        if sequence.drafter is None or sequence.num_pending_tokens != 1:
            return 0
        room = min(max_tokens, sequence.max_tokens - sequence.num_tokens - 1)
        if room <= 0:
            return 0
        drafts = sequence.drafter.propose(sequence.token_ids)[:room]
        num_blocks = self.blocks.num_blocks_for(sequence.num_tokens + len(drafts))
        num_new = num_blocks - len(sequence.block_table)
        if num_new > 0 and num_new + len(self.running) > self.blocks.num_free_blocks:
            return 0
        self.blocks.allocate(sequence, sequence.num_tokens + len(drafts))
        sequence.draft_ids = drafts
        return len(drafts)

    def _admit(self, sequence: Sequence, budget: StepBudget) -> int:
        """Allocates blocks for a waiting sequence; returns its tokens, or 0 if there is no room.

        The whole prompt gets its blocks at once, and each running sequence keeps one in reserve, so
        that an admitted sequence is not preempted again by the very next step.
        """
        lacks_rows = sequence.request.prompt_logprobs and not budget.logprob_rows
        if sequence.has_placeholder or not budget.chunk_tokens or lacks_rows:
            return 0
        num_cached = self.blocks.match_prefix(sequence)
        num_new = self.blocks.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        reserve = len(self.running)
        if num_new + reserve > self.blocks.num_free_blocks:
            self.blocks.free(sequence)
            return 0
        self.blocks.allocate(sequence, sequence.num_tokens)
        sequence.num_computed_tokens = sequence.num_cached_tokens = num_cached
        return self._take(sequence, budget)

    def _make_room(self, sequence: Sequence, num_tokens: int, planned: dict[Sequence, int]) -> bool:
        """Allocates blocks for a running sequence, preempting the youngest ones if necessary.

        Returns:
            False if the sequence itself was the youngest and has been preempted.
        """
        while not self.blocks.allocate(sequence, sequence.num_computed_tokens + num_tokens):
            victim = self.running[-1]
            assert victim not in planned, "sequences are planned from the oldest to the youngest"
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Moves a running sequence to the head of the queue, to be recomputed."""
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.reset()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
