"""Which sequences compute how many tokens in the next step.

One rule for everything: every running sequence has pending tokens (one while it decodes, the rest
of its prompt while it prefills) and gets as many of them as the step's token budget leaves. So
chunked prefill, prefix hits and recomputation after a preemption need no code of their own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ..protocol.errors import CapacityError
from ..protocol.request import MomentKind
from .block_manager import BlockManager
from .draft_lengths import draft_lengths
from .moments import Moments
from .prompt_lookup import Drafter
from .sequence import Sequence, SequenceStatus
from .step_costs import StepCosts
from .turns import Turns
from .waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """Tokens to compute in a step, by sequence, in the order of the rows.

    `num_started` of the sequences have waited until now; planning took `schedule_s` seconds.
    """

    num_tokens: dict[Sequence, int]
    num_started: int = 0
    schedule_s: float = 0.0

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
        image_tokens: placeholders of images that are to be encoded.
        images: the digests of those that are encoded in this step.
    """

    tokens: int
    chunk_tokens: int
    logprob_rows: int
    image_tokens: int = 0
    images: set[bytes] = field(default_factory=set)


class Scheduler:
    """Callers in turn, the sequences of one caller as they came, under a token budget.

    A decoding sequence always gets its token; what takes turns is the rest of the budget, for
    prompts. A sequence of a lower priority number goes before the others of its caller, and is
    preempted after them.

    Args:
        blocks: the allocator of the KV cache's blocks.
        max_step_tokens: the most tokens computed in one step.
        max_chunk_tokens: of these, the most tokens of prompts in a step for whose end somebody
            waits: decoding sequences get their next tokens only then, and where there are several
            callers, another one's first token comes no sooner. None sets no extra bound.
        min_chunk_tokens: with several callers a step has no more tokens of prompts than the
            shortest of their last prompts, but so many: smaller steps would cost too much.
        max_num_seqs: the most sequences running at the same time.
        max_logprob_rows: the most tokens per step of prompts whose log-probabilities are wanted:
            each such row takes memory for the logits of a whole vocabulary.
        max_draft_tokens: the most draft tokens of a decoding sequence that a step verifies; 0
            switches speculation off.
        max_image_tokens: the most placeholders whose images a step encodes, or one image.
        is_encoded: whether the image of a digest is encoded already.
        keeps_images: whether the tokens of an image are computed in one step.
        max_adapters: the most adapters in a step. A sequence with one more waits, and those after
            it, until one of these has no running sequence.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_step_tokens: int,
        max_num_seqs: int,
        max_chunk_tokens: int | None = None,
        min_chunk_tokens: int | None = None,
        max_logprob_rows: int = 256,
        max_draft_tokens: int = 0,
        max_adapters: int = 0,
        max_image_tokens: int = 1024,
        is_encoded: Callable[[bytes], bool] = lambda _: False,
        keeps_images: bool = False,
    ) -> None:
        self.blocks = blocks
        self.max_step_tokens = max_step_tokens
        self.max_chunk_tokens = max_chunk_tokens or max_step_tokens
        self.min_chunk_tokens = min(min_chunk_tokens or max_step_tokens, self.max_chunk_tokens)
        self.max_num_seqs = min(max_num_seqs, max_step_tokens)  # each needs a token per step
        self.max_logprob_rows = max_logprob_rows
        self.max_draft_tokens = max_draft_tokens
        self.max_adapters = max_adapters
        self.max_image_tokens = max_image_tokens
        self._is_encoded = is_encoded
        self._keeps_images = keeps_images
        self.turns = Turns()
        self.waiting = WaitingQueue(self.turns)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.moments = Moments()
        self._step_costs = StepCosts()
        self._num_arrived = 0
        self._num_started = 0  # in the step that is being planned

    @property
    def max_running_tokens(self) -> int:
        """What the running sequences may come to."""
        return sum(sequence.max_tokens for sequence in self.running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            CapacityError: it would not fit into the cache even alone, or has an image that does
                not fit into a step beside the tokens of others.
        """
        if self._keeps_images:
            self._check_images(sequence)
        # The last token is returned but never computed, so it needs no slot.
        num_blocks = self.blocks.num_blocks_for(sequence.max_tokens - 1)
        if num_blocks > self.blocks.num_blocks:
            raise CapacityError(
                f"{sequence.max_tokens} tokens do not fit into a KV cache of "
                f"{self.blocks.num_blocks} blocks"
            )
        if self.max_draft_tokens and not sequence.request.grammar:
            sequence.drafter = Drafter(self.max_draft_tokens)
        self._num_arrived += 1
        sequence.arrival = self._num_arrived
        self.turns.enter(sequence.caller, sequence.num_tokens)
        self.waiting.push(sequence)

    def _check_images(self, sequence: Sequence) -> None:
        """See `add`: of a step, each other sequence may take a token."""
        room = self.max_step_tokens - self.max_num_seqs + 1
        if sequence.request.prompt_logprobs:
            room = min(room, self.max_logprob_rows)
        longest = max((image.longest_span for image in sequence.request.images), default=0)
        if longest > room:
            raise CapacityError(
                f"an image of {longest} tokens, which are computed in one step, is too large for "
                f"steps with room for {room}"
            )

    def schedule(self) -> ScheduledBatch:
        """Plans a step: decoding sequences, then prompts, then draft tokens with what is left."""
        started = time.perf_counter()
        self.turns.step()
        self._num_started = 0
        budget = StepBudget(
            tokens=self.max_step_tokens,
            chunk_tokens=self._chunk_tokens(),
            logprob_rows=self.max_logprob_rows,
            image_tokens=self.max_image_tokens,
        )
        planned: dict[Sequence, int] = {}
        self._plan_decodes(budget, planned)
        decoding = list(planned)
        self._plan_prompts(budget, planned)
        self._plan_drafts(decoding, budget, planned)
        self.blocks.plan(planned)
        return ScheduledBatch(planned, self._num_started, time.perf_counter() - started)

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
        self.blocks.accept(sequence, num_drafts)
        self.blocks.commit(sequence)

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Learns from a step in which all sequences decode how many draft tokens are worth it."""
        if self.max_draft_tokens:
            self._step_costs.observe(len(batch.num_tokens), batch.total_tokens, seconds)

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence, whether it runs or waits; its blocks are free at once."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        (self.running if sequence.status is SequenceStatus.RUNNING else self.waiting).remove(
            sequence
        )
        self.turns.leave(sequence.caller)
        sequence.status = SequenceStatus.FINISHED
        self.blocks.free(sequence)

    def _chunk_tokens(self) -> int:
        """The most tokens of prompts in the next step: fewer if somebody waits for its end."""
        least_asked = self.turns.least_asked
        if least_asked is not None:
            return min(max(least_asked, self.min_chunk_tokens), self.max_chunk_tokens)
        any_decoding = any(sequence.num_pending_tokens == 1 for sequence in self.running)
        return self.max_chunk_tokens if any_decoding else self.max_step_tokens

    def _plan_decodes(self, budget: StepBudget, planned: dict[Sequence, int]) -> None:
        """Gives every decoding sequence its token, in the order in which they began to run."""
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or sequence.num_pending_tokens != 1:
                continue  # perhaps preempted earlier in this loop
            if self._make_room(sequence, budget, planned):
                self._plan(sequence, 1, budget, planned)

    def _plan_prompts(self, budget: StepBudget, planned: dict[Sequence, int]) -> None:
        """Gives prompts their tokens, callers in turn: those that are begun, and those that wait.

        Whoever's turn it is starts or nobody does: if smaller requests overtook, a large one would
        starve. With several callers, a prompt that would not end in this step waits for the next
        one where another's ends, whose first token it would only delay; unless it is its turn.
        """
        begun = [sequence for sequence in self.running if sequence.num_pending_tokens > 1]
        can_start = True
        any_ends = False
        several = self.turns.least_asked is not None
        while budget.tokens:
            waiting = self.waiting.first() if can_start else None
            sequence = min(begun, key=self._turn, default=waiting)
            if sequence is None:
                break
            if waiting is not None and self._turn(waiting) < self._turn(sequence):
                sequence = waiting
            is_late = any_ends and several and sequence.num_pending_tokens > budget.chunk_tokens
            if sequence is waiting:
                num_tokens = 0 if is_late else self._start(sequence, budget, planned)
                can_start = num_tokens > 0
            else:
                begun.remove(sequence)
                num_tokens = 0 if is_late else self._continue(sequence, budget, planned)
            self._plan(sequence, num_tokens, budget, planned)
            any_ends |= 0 < num_tokens == sequence.num_pending_tokens

    def _continue(
        self, sequence: Sequence, budget: StepBudget, planned: dict[Sequence, int]
    ) -> int:
        """How many tokens a sequence gets whose prompt, or what a grammar forces, is begun.

        A prompt has its blocks since its start; forced tokens may need one more.
        """
        if sequence.status is not SequenceStatus.RUNNING:  # it has given way
            return 0
        return self._take(sequence, budget) if self._make_room(sequence, budget, planned) else 0

    def _plan_drafts(
        self, decoding: list[Sequence], budget: StepBudget, planned: dict[Sequence, int]
    ) -> None:
        """Adds draft tokens to decoding sequences, as many as are worth their rows."""
        offers: dict[Sequence, tuple[float, list[int]]] = {}
        for sequence in decoding:
            sequence.draft_ids = []
            if sequence in planned and (drafter := sequence.drafter) is not None:
                room = max(0, sequence.max_tokens - sequence.num_tokens - 1)
                drafts = drafter.propose(sequence.token_ids)[:room]
                offers[sequence] = (drafter.acceptance, drafts)
        sizes = [(acceptance, len(drafts)) for acceptance, drafts in offers.values()]
        lengths = draft_lengths(sizes, len(decoding), self._step_costs.row_share(len(decoding)))
        for (sequence, (_, drafts)), length in zip(offers.items(), lengths, strict=True):
            num_drafts = self._draft(sequence, drafts[: min(length, budget.tokens)])
            self._plan(sequence, num_drafts, budget, planned)

    def _plan(
        self, sequence: Sequence, num_tokens: int, budget: StepBudget, planned: dict[Sequence, int]
    ) -> None:
        """Gives a sequence tokens, or more of them, in this step."""
        if num_tokens:
            planned[sequence] = planned.get(sequence, 0) + num_tokens
            budget.tokens -= num_tokens
            self.turns.charge(sequence.caller, num_tokens)

    def _turn(self, sequence: Sequence) -> tuple[int, tuple[int, int]]:
        """Whose turn it is: the least is next."""
        return self.turns.served(sequence.caller), sequence.urgency

    def _take(self, sequence: Sequence, budget: StepBudget) -> int:
        """How many of its pending tokens a sequence gets.

        A prompt's tokens are taken off the budget here, except from `budget.tokens`: see `_plan`.
        """
        if sequence.num_pending_tokens <= 1:
            return min(sequence.num_pending_tokens, budget.tokens)
        num_tokens = min(sequence.num_pending_tokens, budget.tokens, budget.chunk_tokens)
        most = budget.tokens
        if sequence.request.prompt_logprobs:
            most = min(most, budget.logprob_rows)
        num_tokens = min(num_tokens, most)
        if sequence.request.images:
            num_tokens = self._up_to_image(sequence, num_tokens, budget)
            if self._keeps_images and num_tokens:
                num_tokens = _with_whole_images(sequence, num_tokens, most)
        if sequence.request.prompt_logprobs:
            budget.logprob_rows -= num_tokens
        budget.chunk_tokens = max(0, budget.chunk_tokens - num_tokens)
        return num_tokens

    def _up_to_image(self, sequence: Sequence, num_tokens: int, budget: StepBudget) -> int:
        """How many of these tokens come before an image that this step cannot encode any more."""
        first = sequence.num_computed_tokens
        for image in sequence.request.images:
            if image.start >= first + num_tokens:
                break
            is_there = image.digest in budget.images or self._is_encoded(image.digest)
            if image.end <= first or is_there:
                continue
            if budget.image_tokens <= 0:
                return max(image.start - first, 0)
            budget.image_tokens -= image.num_tokens
            budget.images.add(image.digest)
        return num_tokens

    def _draft(self, sequence: Sequence, drafts: list[int]) -> int:
        """Gives a decoding sequence draft tokens; returns how many.

        They get spare blocks only: every running sequence keeps one in reserve.
        """
        num_blocks = self.blocks.num_blocks_for(sequence.num_tokens + len(drafts))
        num_new = max(0, num_blocks - len(sequence.block_table))
        if num_new and num_new + len(self.running) > self.blocks.num_free_blocks:
            return 0
        drafts = drafts[: self.blocks.reserve_drafts(sequence, len(drafts))]
        self.blocks.allocate(sequence, sequence.num_tokens + len(drafts))
        sequence.draft_ids = drafts
        return len(drafts)

    def _start(self, sequence: Sequence, budget: StepBudget, planned: dict[Sequence, int]) -> int:
        """Starts a waiting sequence; returns its tokens in this step, or 0 if there is no room.

        Callers that hold more than their share give way.
        """
        num_tokens = self._admit(sequence, budget)
        while num_tokens is None and self._give_way(sequence, budget, planned):
            num_tokens = self._admit(sequence, budget)
        if num_tokens:
            self.waiting.remove(sequence)
            is_first = sequence.num_preemptions == 0
            kind = MomentKind.STARTED if is_first else MomentKind.RESUMED
            self.moments.note(sequence.request_id, kind)
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            self._num_started += 1
        return num_tokens or 0

    def _admit(self, sequence: Sequence, budget: StepBudget) -> int | None:
        """Allocates blocks for a waiting sequence.

        The whole prompt gets its blocks at once, and each running sequence keeps one in reserve, so
        that an admitted sequence is not preempted again by the very next step.

        Returns:
            Its tokens in this step; 0 if the step has none for it, such as for an image that is
            computed whole. None if others have its blocks or its place.
        """
        if not self._may_start(sequence, budget):
            return 0
        if len(self.running) >= self.max_num_seqs:
            return None
        num_cached = self.blocks.match_prefix(sequence)
        sequence.num_computed_tokens = sequence.num_cached_tokens = num_cached
        num_new = self.blocks.num_lacking(sequence, sequence.num_tokens)
        reserve = self.blocks.reserve * len(self.running)
        has_room = num_new + reserve <= self.blocks.num_free_blocks
        num_tokens = self._take(sequence, budget) if has_room else None
        if num_tokens:
            self.blocks.allocate(sequence, sequence.num_tokens)
        else:
            self.blocks.free(sequence)
            sequence.num_computed_tokens = sequence.num_cached_tokens = 0
        return num_tokens

    def _may_start(self, sequence: Sequence, budget: StepBudget) -> bool:
        """Whether this step's budget has something for a waiting sequence."""
        lacks_rows = sequence.request.prompt_logprobs and not budget.logprob_rows
        lacks_images = bool(sequence.request.images) and budget.image_tokens <= 0
        if not budget.chunk_tokens or sequence.has_placeholder or lacks_rows or lacks_images:
            return False
        return not sequence.request.adapter or self._has_slot(sequence)

    def _has_slot(self, sequence: Sequence) -> bool:
        """Whether the sequence's adapter can be on the device beside those in use."""
        adapters = {other.request.adapter for other in self.running} - {""}
        return sequence.request.adapter in adapters or len(adapters) < self.max_adapters

    def _give_way(
        self, sequence: Sequence, budget: StepBudget, planned: dict[Sequence, int]
    ) -> bool:
        """Preempts a sequence of a caller that keeps its share of the server without it.

        Only for a caller that has less than its share, even with the sequence that waits.

        Returns:
            Whether one was preempted.
        """
        if not self._may_start(sequence, budget):
            return False
        if len(self.running) >= self.max_num_seqs:
            victim = self._over_share(sequence, 1, self.max_num_seqs, lambda _: 1)
        else:
            needed = self.blocks.num_blocks_for(sequence.num_tokens)
            total = self.blocks.num_blocks
            victim = self._over_share(sequence, needed, total, self.blocks.num_held)
        if victim is not None:
            self._preempt(victim, budget, planned)
        return victim is not None

    def _over_share(
        self, sequence: Sequence, needed: int, total: int, size: Callable[[Sequence], int]
    ) -> Sequence | None:
        """The sequence that gives way to one that waits, so that every caller can have its share.

        Args:
            sequence: it waits.
            needed: what it takes of what is shared: blocks, or places among the running.
            total: all there is.
            size: what a running sequence holds of it.
        """
        held: Counter[str] = Counter({sequence.caller: 0})
        for other in self.running:
            held[other.caller] += size(other)
        share = total // len(held)
        caller, largest = held.most_common(1)[0]
        if caller == sequence.caller or held[sequence.caller] + needed > share:
            return None
        victim = self._least_urgent(caller)
        return victim if largest - size(victim) >= share else None

    def _least_urgent(self, caller: str) -> Sequence:
        return max((s for s in self.running if s.caller == caller), key=lambda s: s.urgency)

    def _make_room(
        self, sequence: Sequence, budget: StepBudget, planned: dict[Sequence, int]
    ) -> bool:
        """Allocates the blocks that a running sequence needs, preempting others for it.

        The caller that came last gives way, with the least urgent of its sequences.

        Returns:
            False if that was the sequence itself.
        """
        while not self.blocks.allocate(sequence, sequence.num_tokens):
            victim = self._least_urgent(self.running[-1].caller)
            self._preempt(victim, budget, planned)
            if victim is sequence:
                return False
        return True

    def _preempt(
        self, sequence: Sequence, budget: StepBudget, planned: dict[Sequence, int]
    ) -> None:
        """Lets a running sequence wait again, to be recomputed, and takes it out of the plan."""
        num_tokens = planned.pop(sequence, 0)
        budget.tokens += num_tokens
        self.turns.charge(sequence.caller, -num_tokens)
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.reset()
        self.waiting.push(sequence)
        self.num_preemptions += 1
        self.moments.note(sequence.request_id, MomentKind.PREEMPTED)


def _with_whole_images(sequence: Sequence, num_tokens: int, most: int) -> int:
    """How many tokens a sequence gets so that none of its images is left begun.

    Its next ones are an image if nothing comes before it, even if that are more than were planned.

    Args:
        sequence: whose next tokens they are.
        num_tokens: as many as it would get.
        most: that it can get.
    """
    first = sequence.num_computed_tokens
    for image in sequence.request.images:
        for start, length in image.spans:
            if start < first + num_tokens < start + length:
                whole = start + length - first
                return whole if start <= first and whole <= most else max(start - first, 0)
    return num_tokens
