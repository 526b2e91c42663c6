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


class Scheduler:
    """First come, first served, under a token budget.

    Args:
        blocks: the cache's books.
        max_step_tokens: tokens computed in one step at most.
        max_chunk_tokens: of these, tokens of prompts in a step in which others decode: as long as
            such a step takes, they wait for their next tokens. None has no bound of its own.
        max_num_seqs: sequences running at a time at most.
        max_logprob_rows: tokens per step at most of prompts whose log-probabilities are wanted:
            each such row costs a vocabulary of logits.
        max_draft_tokens: guessed tokens that a decoding sequence has checked in a step at most; 0
            switches guessing off.
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
        self._chunk_tokens = 0  # of prompts, that this step may still have
        self._logprob_rows = 0  # likewise

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            CapacityError: it would not fit into the cache even alone.
        """
        # The last token is returned but never computed, so it takes no room.
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
        budget = self.max_step_tokens
        somebody_decodes = any(sequence.num_pending_tokens == 1 for sequence in self.running)
        self._chunk_tokens = self.max_chunk_tokens if somebody_decodes else budget
        self._logprob_rows = self.max_logprob_rows
        planned: dict[Sequence, int] = {}
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted a moment ago, for one that came earlier
            num_tokens = self._take(sequence, budget)
            if num_tokens and self._make_room(sequence, num_tokens, planned):
                num_tokens += self._draft(sequence, budget - num_tokens)
                planned[sequence] = num_tokens
                budget -= num_tokens
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            num_tokens = self._admit(self.waiting[0], budget)
            if not num_tokens:
                break  # nobody overtakes: a large request would otherwise starve
            sequence = self.waiting.popleft()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            planned[sequence] = num_tokens
            budget -= num_tokens
        return ScheduledBatch(planned)

    def advance(self, batch: ScheduledBatch) -> None:
        """Notes that the device computes the step before all that it is told later."""
        for sequence, num_tokens in batch.num_tokens.items():
            sequence.num_computed_tokens += num_tokens - len(sequence.draft_ids)
            self.blocks.commit(sequence)

    def accept(self, sequence: Sequence, num_drafts: int) -> None:
        """Notes that a sequence has its tokens, and how many of the step's guesses are among them.

        The cache has their keys and values already; those of wrong guesses are overwritten later.
        """
        if sequence.drafter is not None and sequence.draft_ids:
            sequence.drafter.report(len(sequence.draft_ids), num_drafts)
        sequence.draft_ids = []
        sequence.num_computed_tokens += num_drafts
        self.blocks.commit(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence, wherever it stands; its blocks are free at once."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        (self.running if sequence.status is SequenceStatus.RUNNING else self.waiting).remove(
            sequence
        )
        sequence.status = SequenceStatus.FINISHED
        self.blocks.free(sequence)

    def _take(self, sequence: Sequence, budget: int) -> int:
        """How many of its pending tokens a sequence gets, out of what is left of the budgets."""
        if sequence.num_pending_tokens <= 1:
            return min(sequence.num_pending_tokens, budget)
        num_tokens = min(sequence.num_pending_tokens, budget, self._chunk_tokens)
        if sequence.request.prompt_logprobs:
            num_tokens = min(num_tokens, self._logprob_rows)
            self._logprob_rows -= num_tokens
        self._chunk_tokens -= num_tokens
        return num_tokens

    def _draft(self, sequence: Sequence, budget: int) -> int:
        """Guesses tokens for a sequence that decodes; they take nothing that others need."""
        sequence.draft_ids = []
        if sequence.drafter is None or sequence.num_pending_tokens != 1:
            return 0
        room = min(budget, sequence.max_tokens - sequence.num_tokens - 1)
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

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Gives a waiting sequence its blocks; 0 when there is no room, otherwise its tokens.

        The whole prompt gets its blocks at once, and each running sequence keeps one in reserve:
        whoever is let in is not thrown out again by the very next step.
        """
        rows_are_out = sequence.request.prompt_logprobs and not self._logprob_rows
        if sequence.has_placeholder or not self._chunk_tokens or rows_are_out:
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
        """Finds blocks for a running sequence, taking them from the youngest one if it must.

        Returns:
            False when the sequence itself was the youngest and had to go.
        """
        while not self.blocks.allocate(sequence, sequence.num_computed_tokens + num_tokens):
            victim = self.running[-1]
            assert victim not in planned, "sequences are planned from the oldest to the youngest"
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Puts the youngest running sequence back to the queue's head, to be recomputed."""
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.reset()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
