"""What a request says to the chat template beside its messages and tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ErrorKind, ServiceError

MAX_KWARGS_BYTES = 64 * 1024  # of their JSON
_MAX_EFFORT_CHARS = 32
# Names that transformers gives a meaning of its own, or that other fields set.
_RESERVED = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFields:
    """Variables of the chat template; None is absent.

    Attributes:
        kwargs: further variables, by name.
        reasoning_effort: how long a model shall reason, in words that its template knows.
        documents: texts to answer from, in a form that the template knows.
        add_generation_prompt: whether the prompt ends with the beginning of an answer.
        continue_final_message: whether the answer continues the last message.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    documents: tuple[Any, ...] = ()
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def check(self) -> None:
        """Checks the fields, each and together.

        Raises:
            ServiceError: one has an impossible value, or two contradict each other.
        """
        if self.add_generation_prompt and self.continue_final_message:
            raise _invalid(
                "continue_final_message",
                "only one of `add_generation_prompt` and `continue_final_message` may be true",
            )
        self._check_kwargs()
        effort = self.reasoning_effort
        if effort is not None and not 0 < len(effort) <= _MAX_EFFORT_CHARS:
            text = f"`reasoning_effort` must have 1 to {_MAX_EFFORT_CHARS} characters"
            raise _invalid("reasoning_effort", text)
        if not all(isinstance(document, dict) for document in self.documents):
            raise _invalid("documents", "`documents` must be a list of objects")

    def _check_kwargs(self) -> None:
        name = "chat_template_kwargs"
        reserved = sorted(_RESERVED & self.kwargs.keys())
        if reserved:
            raise _invalid(name, f"`{name}` must not have `{reserved[0]}`")
        if self.reasoning_effort is not None and "reasoning_effort" in self.kwargs:
            text = f"only one of `reasoning_effort` and `{name}.reasoning_effort` may be set"
            raise _invalid("reasoning_effort", text)
        size = len(json.dumps(self.kwargs).encode()) + len(json.dumps(self.documents).encode())
        if size > MAX_KWARGS_BYTES:
            text = f"`{name}` and `documents` must have at most {MAX_KWARGS_BYTES} bytes together"
            raise _invalid(name, f"{text}. Given: {size}")

    def variables(self) -> dict[str, Any]:
        """What the template gets."""
        variables: dict[str, Any] = dict(self.kwargs)
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
        if self.documents:
            variables["documents"] = list(self.documents)
        continues = bool(self.continue_final_message)
        adds = self.add_generation_prompt
        variables["add_generation_prompt"] = not continues if adds is None else adds
        variables["continue_final_message"] = continues
        return variables


def _invalid(field_name: str, text: str) -> ServiceError:
    return ServiceError(ErrorKind.VALIDATION, text, field=field_name)
