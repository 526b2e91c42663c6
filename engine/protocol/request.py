"""Requests to the engine and its outputs: values without behaviour.

A `Request` never changes. All its parameters have values: `None` means "this filter is off", and
nothing else is optional.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

from .images import Image


class FinishReason(StrEnum):
    """Why a sequence ended."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"  # noqa: S105  a name, not a secret
    STOP_TOKEN = "stop_token"  # noqa: S105  likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the logits.

    `seed` is any unsigned 64-bit integer. With `do_sample` false the likeliest token is taken,
    after penalties. `logit_bias` has token ids, each once, with what is added to their logits. With
    its default, a parameter has no effect.
    """

    do_sample: bool = False
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    top_n_tokens: int = 0
    watermark: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to continue.

    `grammar` is the source of a grammar (see `grammar/backend_llguidance.py`) that the text must
    follow, or empty. `resumed_token_ids` are tokens that an engine has generated for this request
    before it ended: generation continues after them and gives the same tokens as without the break,
    where the model is recomputed exactly (see `model/self_check.py`).

    A token of `eos_token_ids` or `stop_token_ids` ends the text, and is its last token; neither is
    chosen among the first `min_new_tokens`. A grammar ends with one of `eos_token_ids`, so a
    request with both a grammar and `min_new_tokens` may have a step at which no token is allowed.

    With `prompt_logprobs` the log-probabilities of the prompt's tokens are reported, and at each
    place the `prompt_top_n` likeliest tokens.

    `adapter` is the digest of an adapter, see `AdapterInfo`, or empty for the model alone.

    `images` are those of the prompt, in the order of their placeholders.

    `caller` is whoever the work is for: callers take turns. Among the requests of one caller those
    of a lower `priority` are computed first.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    prompt_logprobs: bool = False
    prompt_top_n: int = 0
    grammar: str = ""
    resumed_token_ids: tuple[int, ...] = ()
    caller: str = ""
    priority: int = 0
    adapter: str = ""
    images: tuple[Image, ...] = ()


class Token(NamedTuple):
    """One generated token: its id, its log-probability, and the likeliest ids with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SequenceOutput(NamedTuple):
    """The output of one step for one request.

    `token` is None while the prompt is still being computed. `prompt_logprobs` continues the list
    of earlier steps; the first entry of the whole list is None. `prompt_tops`, if they were asked
    for, has the likeliest tokens for each of these entries, none for the first. `error` ends the
    request without a finish reason. `first_scheduled` marks the first output of a request, and
    `num_cached_tokens` says there how many of its tokens the KV cache had already.
    """

    request_id: str
    token: Token | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[float | None, ...] = ()
    error: str | None = None
    first_scheduled: bool = False
    num_cached_tokens: int = 0
    prompt_tops: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether this is the last output of its request."""
        return self.finish_reason is not None or self.error is not None


class MomentKind(IntEnum):
    """What can happen to a request in the engine."""

    STARTED = 1  # its first step begins
    PREEMPTED = 2  # it lost its blocks and waits again
    RESUMED = 3  # its first step after that begins
    FIRST_TOKEN = 4  # its prompt is computed; after a death of the engine, what was there of it
    FINISHED = 5  # it has its last token


class Moment(NamedTuple):
    """Something that happened to a request.

    `at` is in seconds of `time.monotonic`, whose zero all processes of a machine share.
    """

    request_id: str
    kind: MomentKind
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine after a step.

    `max_running_tokens` is what the running sequences may come to: their prompts and the most
    tokens that they may generate. Of the `num_steps` steps, `num_replayed_steps` were replayed from
    recordings.
    """

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    max_running_tokens: int = 0
    num_replayed_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """The outputs of one step, with figures about the step and the engine.

    Of several services one is told about the step; for the others it is empty but for their own
    outputs and moments, and `stats`.

    `num_seqs` sequences were computed, of which `num_started_seqs` had waited until then.
    `has_failed` says that the model failed on all of them, `is_replayed` that its forward pass was
    replayed from a recording. `moments` are those since the last step, mostly none.

    Durations are seconds: `schedule_s` of planning the step, `forward_s` of the model, `sample_s`
    of sampling, `collect_s` of waiting for the tokens and of what they mean for the sequences,
    `release_s` (a part of it) of taking those that ended out of the batch, `duration_s` of the
    whole step.
    """

    outputs: tuple[SequenceOutput, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)
    num_scheduled_tokens: int = 0
    num_prefill_tokens: int = 0
    forward_s: float = 0.0
    sample_s: float = 0.0
    duration_s: float = 0.0
    moments: tuple[Moment, ...] = ()
    num_seqs: int = 0
    num_started_seqs: int = 0
    schedule_s: float = 0.0
    collect_s: float = 0.0
    release_s: float = 0.0
    has_failed: bool = False
    is_replayed: bool = False
