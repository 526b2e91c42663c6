"""The state of one request in the engine, which changes from step to step."""

from __future__ import annotations

from array import array
from enum import Enum, auto

from ..protocol.request import FinishReason, Request
from .prompt_lookup import Drafter
from .token_counts import TokenCounts


class SequenceStatus(Enum):
    """Whether a sequence waits, runs or is finished."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Token ids known so far, and how many of them are in the KV cache.

    ::

        token_ids  |<------ prompt ------>|<- generated ->|
                   |<- num_computed_tokens ->|<- pending ->|

    When everything but the last token is computed, computing that one gives the next.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "block_table",
        "draft_ids",
        "draft_slots",
        "drafter",
        "finish_reason",
        "has_placeholder",
        "image_positions",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_left_blocks",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "position_delta",
        "prefix_end",
        "request",
        "started",
        "state_copies",
        "state_slot",
        "state_source",
        "status",
        "token_counts",
        "token_ids",
        "window_table",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.arrival = 0  # its number among all sequences of the scheduler
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids: list[int] = [*request.prompt_token_ids, *request.resumed_token_ids]
        self.token_counts: TokenCounts | None = None  # of token_ids, if a penalty needs them
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # of those computed: how many came from the prefix cache
        self.block_table = array("i")  # int32, as kernels read it: packing copies its bytes
        self.window_table = array("i")  # of layers with a window, where these have their own
        self.num_left_blocks = 0  # of window_table: how many are behind the window, and gone
        self.block_hashes: list[bytes] = []  # of the full blocks hashed so far, in order
        self.num_committed_blocks = 0  # of block_table: how many can be shared by their hash
        # Of models that keep a state beside the cache, which is in slots of a pool:
        self.state_slot: int | None = None  # the sequence's own
        self.state_source: int | None = None  # of a kept state, with which the next step begins
        self.state_copies: list[tuple[int, int]] = []  # after how many tokens it is kept, and where
        self.draft_slots: list[int] = []  # of the states before each draft token
        self.prefix_end = 0  # the tokens of its prefix whose blocks were in the cache
        self.status = SequenceStatus.WAITING
        self.num_prompt_logprobs = 0  # reported so far: not again after a preemption
        self.num_preemptions = 0
        # Of models with three positions per token, from the first step of a prompt with images on:
        # the prompt's, int64 [3, num_prompt_tokens], and what is added to later tokens' index.
        self.image_positions: object | None = None
        self.position_delta = 0
        self.started = False
        self.finish_reason: FinishReason | None = None
        self.drafter: Drafter | None = None
        self.has_placeholder = False  # the last of token_ids, whose token is being computed
        # Draft tokens that the current step verifies. Replaced, never changed: the step keeps them.
        self.draft_ids: list[int] = []

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def caller(self) -> str:
        """Whoever it is computed for."""
        return self.request.caller

    @property
    def urgency(self) -> tuple[int, int]:
        """Its place among the sequences of its caller: the least comes first."""
        return self.request.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt's and the generated ones."""
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated, those from before a resumption included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known but not computed yet: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_known_tokens(self) -> int:
        """Tokens that are computed, and whose ids are known."""
        return min(self.num_computed_tokens, len(self.token_ids) - self.has_placeholder)

    @property
    def max_tokens(self) -> int:
        """The length at which the sequence ends at the latest."""
        return self.num_prompt_tokens + self.request.max_new_tokens

    @property
    def needs_sampled_tokens(self) -> bool:
        """Whether the host must know a token before the step of the next one can be planned."""
        return (
            bool(self.request.grammar)
            or self.drafter is not None
            or self.request.sampling.watermark
        )

    @property
    def pending_row(self) -> int | None:
        """The row of the running step that samples its last token; None if that is known."""
        return -1 - self.token_ids[-1] if self.has_placeholder else None

    def append_placeholder(self, row: int) -> None:
        """Appends a placeholder for the token that a row of the running step samples.

        Its id is -1 - row. Nothing is appended if that token is the last one allowed.
        """
        if self.num_tokens + 1 < self.max_tokens:
            self.token_ids.append(-1 - row)
            self.has_placeholder = True

    def append(self, token_id: int) -> FinishReason | None:
        """Appends a generated token, or replaces its placeholder; returns why the sequence ends.

        A token that is both the last allowed and an end-of-text token counts as `LENGTH`, as in TGI
        (server/text_generation_server/utils/tokens.py at v2.1.1, StoppingCriteria).
        """
        if self.has_placeholder:
            self.token_ids[-1] = token_id
            self.has_placeholder = False
        else:
            self.token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts.add(token_id)
        if self.num_generated_tokens >= self.request.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        elif token_id in self.request.eos_token_ids:
            self.finish_reason = FinishReason.EOS_TOKEN
        elif token_id in self.request.stop_token_ids:
            self.finish_reason = FinishReason.STOP_TOKEN
        return self.finish_reason

    def count_tokens(self) -> TokenCounts:
        """How often each token occurs in the prompt and in what was generated.

        Without a last one that is still being computed.
        """
        if self.token_counts is None:
            known = len(self.token_ids) - self.has_placeholder
            self.token_counts = TokenCounts(self.token_ids[:known])
        return self.token_counts

    def reset(self) -> None:
        """Marks all tokens as not computed, after the blocks have been freed."""
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.draft_ids = []
        self.num_preemptions += 1
        self.status = SequenceStatus.WAITING


class DraftedSequence:
    """A sequence as it will be if its first `num_drafts` draft tokens are accepted.

    It has what sampling needs: parameters, tokens and their number.
    """

    __slots__ = ("_num_drafts", "_sequence", "pending_row", "request")

    def __init__(self, sequence: Sequence, num_drafts: int) -> None:
        self._sequence = sequence
        self._num_drafts = num_drafts
        self.request = sequence.request
        self.pending_row: int | None = None  # drafts need all tokens before them

    @property
    def num_tokens(self) -> int:
        """Tokens, the draft tokens included."""
        return self._sequence.num_tokens + self._num_drafts

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated, the draft tokens included."""
        return self._sequence.num_generated_tokens + self._num_drafts

    @property
    def token_ids(self) -> list[int]:
        """Ids of all these tokens."""
        return self._sequence.token_ids + self._sequence.draft_ids[: self._num_drafts]

    def count_tokens(self) -> TokenCounts:
        """How often each token occurs, the draft tokens included."""
        drafts = self._sequence.draft_ids[: self._num_drafts]
        return self._sequence.count_tokens().extended(drafts)


SampledSequence = Sequence | DraftedSequence
