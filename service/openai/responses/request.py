"""A request in the shape of OpenAI's Responses API: a conversation, and what its answer repeats."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import ServiceError
from ...generation.json_values import count_values
from ...generation.limits import Limits, check_count
from ..chat import ChatRequest

# What this endpoint calls the fields of a chat; a tool's have no `function` in their path.
_FIELD_NAMES = {
    "inputs": "input",
    "messages": "input",
    "parameters.adapter_id": "model",
    "parameters.max_new_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "parameters.top_n_tokens": "top_logprobs",
    "parameters.grammar": "text.format",
    "parameters.grammar.other": "text.format",
    "parameters.grammar.type": "text.format.type",
    "parameters.grammar.value": "text.format.schema",
    "response_format": "text.format",
    "response_format.value": "text.format.schema",
    "reasoning_effort": "reasoning.effort",
    "model": "model",
}
# The same names where texts of errors quote them.
_QUOTED = {
    "inputs": "input",
    "messages": "input",
    "max_new_tokens": "max_output_tokens",
    "top_n_tokens": "top_logprobs",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_QUOTE = re.compile(rf"`({'|'.join(_QUOTED)})`")
_OF_TOOL = re.compile(r"(tools\[\d+\])\.function\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """A conversation to continue.

    Attributes:
        chat: the conversation, with all that decides the answer.
        repeated: the fields, as JSON, that the answer repeats.
        arguments: the arguments of calls in the input, each with its path.
    """

    chat: ChatRequest
    repeated: Mapping[str, Any]
    arguments: tuple[tuple[str, str], ...] = ()

    def check(self, limits: Limits) -> None:
        """Checks what only this endpoint has.

        Raises:
            ServiceError: the arguments of calls have too many values.
        """
        count = 0
        for path, text in self.arguments:
            count += count_values(text.encode(errors="replace"))
            check_count(path, count, limits.max_request_values, "JSON values")


@contextmanager
def responses_fields(request: ResponsesRequest) -> Iterator[None]:
    """Names fields in errors of the block as this endpoint calls them.

    Raises:
        ServiceError: the same as in the block, with other names.
    """
    try:
        yield
    except ServiceError as error:
        raise _renamed(error, has_tools=bool(request.chat.tools)) from error


def _renamed(error: ServiceError, *, has_tools: bool) -> ServiceError:
    field = error.field
    if field == "parameters.grammar" and has_tools:
        field = "tools"
    elif field is not None:
        field = _FIELD_NAMES.get(field, _OF_TOOL.sub(r"\1", field.removeprefix("parameters.")))
    text = _QUOTE.sub(lambda match: f"`{_QUOTED[match[1]]}`", _OF_TOOL.sub(r"\1", error.reason))
    return ServiceError(
        error.kind, text, field=field, retry_after_s=error.retry_after_s, code=error.code
    )
