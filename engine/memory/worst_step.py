"""The memory of the largest possible step, so that the KV cache gets exactly what it leaves.

The step is computed before the cache is sized: with as many tokens as a step may have, the longest
context, as many rows of logits as can be wanted, and every filter on them. Which kind of step takes
the most memory depends on the model and on the attention, so there is one of each kind. All their
block tables refer to the only block of a small cache, whose content does not matter here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..block_form import BlockForm
from ..executor import Executor
from ..protocol.request import Request, SamplingParams
from ..scheduling.scheduler import ScheduledBatch
from ..scheduling.sequence import Sequence

_EVERYTHING = SamplingParams(
    do_sample=True,
    temperature=0.5,
    top_k=50,
    top_p=0.999,
    typical_p=0.999,
    min_p=0.001,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    top_n_tokens=5,
    watermark=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """The limits of every step, see `Scheduler`, and `max_total_tokens` of a sequence.

    `adapter` is the digest of one, if there are any: all take the same memory. `state_slot` is one,
    of a model that keeps a state beside the cache; `form` is that of the cache's blocks, where
    layers with a window have their own.
    """

    max_total_tokens: int
    max_step_tokens: int
    max_num_seqs: int
    max_logprob_rows: int
    max_draft_tokens: int
    block_size: int
    adapter: str = ""
    state_slot: int | None = None
    form: BlockForm | None = None

    def worst_decode(self) -> ScheduledBatch:
        """As many sequences as can run, each with as many draft tokens as the budget leaves."""
        num_seqs = min(self.max_num_seqs, self.max_step_tokens)
        return ScheduledBatch(self._decoding(num_seqs, self.max_step_tokens))

    def worst_prefill(self) -> ScheduledBatch:
        """A step full of prompts, some of whose log-probabilities are wanted."""
        return ScheduledBatch(self._filled_with_prompts({}))

    def worst_mixed(self) -> ScheduledBatch:
        """Decoding sequences, and as many tokens of prompts as the budget leaves.

        It has as many tokens as a step of prompts, and attention keeps partial results for each
        sequence in it. The sequences of the prompts come on top of all that can run, so there are
        a few more than in a real step.
        """
        return ScheduledBatch(self._filled_with_prompts(self.worst_decode().num_tokens))

    def recorded(self, num_tokens: int, num_seqs: int) -> ScheduledBatch:
        """A step as it is recorded: decoding, with draft tokens, or with a prompt."""
        if num_seqs >= num_tokens - 1:
            return ScheduledBatch(self._decoding(num_seqs, num_tokens))
        planned = self._decoding(num_seqs - 1, num_seqs - 1)
        left, longest = num_tokens - len(planned), self.max_total_tokens - 1
        while left:
            width = min(left, longest)
            planned[self._sequence(len(planned), longest, longest - width)] = width
            left -= width
        return ScheduledBatch(planned)

    def greedy(self) -> ScheduledBatch:
        """A step of a sequence that asks for nothing: the most usual one."""
        request = Request(request_id="0", prompt_token_ids=(0,), max_new_tokens=1)
        sequence = Sequence(request)
        self._fill_tables(sequence, 1)
        sequence.state_slot = self.state_slot
        return ScheduledBatch({sequence: 1})

    def _decoding(self, num_seqs: int, num_tokens: int) -> dict[Sequence, int]:
        """`num_seqs` sequences, each with as many draft tokens as `num_tokens` allows."""
        planned: dict[Sequence, int] = {}
        left = num_tokens
        drafts = min(self.max_draft_tokens, self.max_total_tokens - 2)
        for num_after in reversed(range(num_seqs)):  # sequences, each of which needs a token
            num_drafts = min(drafts, left - num_after - 1)
            # One long context makes the block tables as wide for all sequences.
            length = 1 if planned else self.max_total_tokens - 1 - num_drafts
            sequence = self._sequence(len(planned), length, length - 1)
            sequence.draft_ids = [0] * num_drafts
            planned[sequence] = 1 + num_drafts
            left -= planned[sequence]
        return planned

    def _filled_with_prompts(self, planned: dict[Sequence, int]) -> dict[Sequence, int]:
        left, rows = self.max_step_tokens - sum(planned.values()), self.max_logprob_rows
        longest = self.max_total_tokens - 1
        while left:
            width = min(longest, left, rows or left)
            first = longest - width
            sequence = self._sequence(len(planned), longest, first, prompt_logprobs=rows > 0)
            planned[sequence] = width
            left, rows = left - width, max(0, rows - width)
        return planned

    def _sequence(
        self, number: int, length: int, num_computed: int, *, prompt_logprobs: bool = False
    ) -> Sequence:
        request = Request(
            request_id=f"{number}",
            prompt_token_ids=(0,) * length,
            max_new_tokens=self.max_total_tokens - length,
            sampling=_EVERYTHING,
            prompt_logprobs=prompt_logprobs,
            prompt_top_n=int(prompt_logprobs),
            adapter=self.adapter,
        )
        sequence = Sequence(request)
        sequence.num_computed_tokens = num_computed
        sequence.state_slot = self.state_slot
        self._fill_tables(sequence, length + self.max_draft_tokens)
        return sequence

    def _fill_tables(self, sequence: Sequence, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // self.block_size)
        num_whole = num_blocks if self.form is None else self.form.num_whole(num_tokens)
        sequence.block_table.extend([0] * num_whole)
        sequence.window_table.extend([0] * num_blocks)


def peak_bytes(executor: Executor, batch: ScheduledBatch, device: torch.device) -> int:
    """Bytes of GPU memory that torch takes for a step at its peak.

    That is more than the step's tensors have: freed pieces of other sizes lie between them.

    Raises:
        RuntimeError: the step fails, most likely because memory is short.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    compute(executor, batch)
    return torch.cuda.max_memory_reserved(device) - before


def recorded_bytes(executor: Executor, batch: ScheduledBatch, device: torch.device) -> int:
    """Bytes that a recording of the step's forward keeps, with logits in float32.

    Raises:
        RuntimeError: the forward fails.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    logits = executor.forward(batch)
    forward = torch.cuda.max_memory_reserved(device) - before
    return forward + logits.numel() * torch.float32.itemsize


def compute(executor: Executor, batch: ScheduledBatch) -> None:
    """Computes a step whose results are dropped.

    Raises:
        RuntimeError: it fails.
    """
    step = executor.launch(batch)
    if step.has_failed:
        raise RuntimeError("the largest step there can be fails")
    step.wait()
