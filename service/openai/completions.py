"""Several prompts in one request: OpenAI's older endpoint with TGI's rules."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ErrorKind, ServiceError, missing_field
from ..generation.generation import Generation, TokenEvent
from ..generation.limits import Limits, check_choices
from ..generation.parameters import Parameters, Prompt
from ..text.detokenizer import Decode
from .completion_logprobs import ScoredToken, of_generation
from .head import Head
from .usage import Usage

# What this endpoint calls the fields of `/generate`; the others have the same names.
FIELD_NAMES = {
    "inputs": "prompt",
    "input_ids": "prompt_ids",
    "parameters.adapter_id": "model",
    "parameters.max_new_tokens": "max_tokens",
    "parameters.min_new_tokens": "min_tokens",
    "parameters.top_n_tokens": "logprobs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsRequest:
    """Prompts to continue. `parameters` already has the names of `/generate`.

    With `echo` a text begins with its prompt, and with `is_prompt_alone` it is nothing else.
    """

    prompts: tuple[Prompt, ...]
    parameters: Parameters
    stream: bool = False
    suffix: str | None = None
    n: int | None = None
    logprobs: bool = False
    echo: bool = False
    is_prompt_alone: bool = False
    include_usage: bool = False

    def check(self, limits: Limits) -> None:
        """Checks what only this endpoint has, in TGI's order.

        Raises:
            ServiceError: the request asks for what cannot be done.
        """
        if self.suffix is not None:
            raise ServiceError(
                ErrorKind.SUFFIX,
                "Suffix is not supported and can be achieved by preprocessing the prompt.",
                field="suffix",
            )
        if not self.prompts:
            raise missing_field("prompt")
        if len(self.prompts) > limits.max_client_batch_size:
            raise ServiceError(
                ErrorKind.BATCH_SIZE,
                "Number of prompts exceeds the maximum allowed batch size of "
                f"{limits.max_client_batch_size}",
                field="prompt",
            )
        check_choices(self.n, limits)
        if self.stream and self.echo and self.logprobs:
            text = "`echo` with `logprobs` is not supported when streaming tokens"
            raise ServiceError(ErrorKind.VALIDATION, text, field="echo")

    @property
    def num_choices(self) -> int:
        """Continuations of each prompt."""
        return self.n or 1

    @property
    def top_n(self) -> int:
        """How many of the likeliest tokens to report with log-probabilities."""
        return self.parameters.top_n_tokens or 0

    def answer(
        self, head: Head, prompts: list[list[Generation]], decode: Decode
    ) -> CompletionAnswer:
        """The answer that the generations of each prompt make."""
        if self.is_prompt_alone:
            prompts = [[_without_text(result) for result in choices] for choices in prompts]
        logprobs = None
        if self.logprobs:
            logprobs = [
                of_generation(result, decode, echo=self.echo, top_n=self.top_n)
                for choices in prompts
                for result in choices
            ]
        return CompletionAnswer(head=head, choices=prompts, logprobs=logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAnswer:
    """All continuations, in the prompts' order: a list for each prompt.

    `logprobs` are in the order of `generations`.
    """

    head: Head
    choices: list[list[Generation]]
    logprobs: list[list[ScoredToken]] | None = None

    @property
    def generations(self) -> list[Generation]:
        """All of them."""
        return [result for results in self.choices for result in results]

    @property
    def scored(self) -> list[tuple[Generation, list[ScoredToken] | None]]:
        """All of them, each with its log-probabilities."""
        if self.logprobs is None:
            return [(result, None) for result in self.generations]
        return list(zip(self.generations, self.logprobs, strict=True))

    @property
    def usage(self) -> Usage:
        """Of all prompts together."""
        return Usage.of_choices(self.choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionDelta:
    """One token of one continuation. TGI sends control tokens' text here, too.

    The last token has the finish reason and the whole generation, of which gRPC callers get more.
    """

    head: Head
    index: int
    text: str
    finish_reason: str | None = None
    generation: Generation | None = None
    logprobs: list[ScoredToken] | None = None


class CompletionStream:
    """Turns the tokens of one continuation into its parts.

    Args:
        wanted: the request.
        head: of the whole answer.
        index: the continuation's number among all of the answer.
        prompt: the text that the first part begins with.
    """

    def __init__(
        self, wanted: CompletionsRequest, head: Head, index: int, prompt: str = ""
    ) -> None:
        self._wanted = wanted
        self._head = head
        self._index = index
        self._prompt = prompt
        self._offset = len(prompt)

    def push(self, event: TokenEvent) -> CompletionDelta:
        """The part that a token adds."""
        result, text = event.generation, event.token.text
        if self._wanted.is_prompt_alone:
            text = ""
            result = None if result is None else _without_text(result)
        prompt, self._prompt = self._prompt, ""
        return CompletionDelta(
            head=self._head,
            index=self._index,
            text=prompt + text,
            finish_reason=None if result is None else result.finish_reason,
            generation=result,
            logprobs=self._score(event) if self._wanted.logprobs else None,
        )

    def _score(self, event: TokenEvent) -> list[ScoredToken]:
        top_n = self._wanted.top_n
        scored = ScoredToken.of(event.token, event.top_tokens, self._offset, top_n)
        self._offset += len(event.token.text)
        return [scored]


def _without_text(result: Generation) -> Generation:
    """A generation of which nothing but the prompt is wanted."""
    return replace(
        result, text="", tokens=[], top_tokens=[], finish_reason="length", matched_stop=None
    )
