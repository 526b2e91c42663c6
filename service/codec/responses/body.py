"""The JSON body of POST /v1/responses, field by field.

Unknown fields are ignored at every level, as on the other paths. What would need stored state or
another server is known here, so that it can be refused by name.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ..bodies import Float, Unsigned


class ResponseTool(Struct, kw_only=True):
    """A tool: only functions are served."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: Any = None
    strict: bool | None = None


class ResponseTextFormat(Struct, kw_only=True):
    """A constraint on the text."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None


class ResponseTextConfig(Struct, kw_only=True):
    """The form of the text."""

    format: ResponseTextFormat | None = None
    verbosity: str | None = None


class ResponseReasoning(Struct, kw_only=True):
    """How the model reasons."""

    effort: str | None = None
    summary: str | None = None


class ResponseStreamOptions(Struct, kw_only=True):
    """What else a stream shall contain: nothing is padded, whatever this says."""

    include_obfuscation: bool | None = None


class Responses(Struct, kw_only=True):
    """POST /v1/responses."""

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Unsigned | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: ResponseTextConfig | None = None
    reasoning: ResponseReasoning | None = None
    top_logprobs: Unsigned | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: str | None = None
    store: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    max_tool_calls: Unsigned | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
