"""Several prompts in one request: OpenAI's older endpoint with TGI's rules."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ErrorKind, ServiceError, missing_field
from ..generation.generator import Generation, TokenEvent
from ..generation.limits import Limits, check_choices
from ..generation.parameters import Parameters, Prompt
from .head import Head
from .usage import Usage

# What this endpoint calls the fields of `/generate`; the others have the same names.
FIELD_NAMES = {
    "inputs": "prompt",
    "input_ids": "prompt_ids",
    "parameters.max_new_tokens": "max_tokens",
    "parameters.min_new_tokens": "min_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsRequest:
    """Prompts to continue. `parameters` already has the names of `/generate`."""

    prompts: tuple[Prompt, ...]
    parameters: Parameters
    stream: bool = False
    suffix: str | None = None
    n: int | None = None
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

    @property
    def num_choices(self) -> int:
        """Continuations of each prompt."""
        return self.n or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAnswer:
    """All continuations, in the prompts' order: a list for each prompt."""

    head: Head
    choices: list[list[Generation]]

    @property
    def generations(self) -> list[Generation]:
        """All of them."""
        return [result for results in self.choices for result in results]

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

    @classmethod
    def of(cls, index: int, event: TokenEvent, head: Head) -> CompletionDelta:
        """The part that a token adds to the continuation number `index`."""
        return cls(
            head=head,
            index=index,
            text=event.token.text,
            finish_reason=event.generation.finish_reason if event.generation else None,
            generation=event.generation,
        )
