"""The JSON bodies of REST requests, field by field, with the names of the contract.

Whether a field may be null is TGI's choice (router/src/lib.rs at v2.1.1): those that may have
`None` in their type. Unknown fields are ignored at every level, as in TGI. Floats are rounded to
float32, in which typed callers send them, so that both get the same tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, structs

from .strict_json import Unsigned64

Unsigned = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Signed = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]

_FLOAT32_END = 2.0**128 - 2.0**103  # what rounds to the largest float32 is below it
Float = Annotated[float, Meta(gt=-_FLOAT32_END, lt=_FLOAT32_END)]
Biases = dict[Unsigned, Float]  # by token id, which is a name in JSON

_FLOAT32 = struct.Struct("<f")


class _Body(Struct, kw_only=True):
    """An object with numbers in it."""

    def __post_init__(self) -> None:
        """Makes the numbers what typed callers send."""
        for name, convert in _conversions(type(self)):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, convert(value))


class Grammar(Struct):
    """A constraint on the text of `/generate`."""

    type: Literal["json", "json_object", "regex"]
    value: Any


class Parameters(_Body, kw_only=True):
    """How `/generate` generates. `max_new_tokens: null` is not absent: it means as many as fit."""

    best_of: Unsigned | None = None
    temperature: Float | None = None
    repetition_penalty: Float | None = None
    frequency_penalty: Float | None = None
    top_k: Signed | None = None
    top_p: Float | None = None
    typical_p: Float | None = None
    min_p: Float | None = None
    do_sample: bool = False
    max_new_tokens: Unsigned | UnsetType | None = UNSET
    min_new_tokens: Unsigned | None = None
    ignore_eos: bool = False
    stop_token_ids: list[Unsigned] = []
    logit_bias: Biases | None = None
    priority: Signed | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: Unsigned | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: Unsigned64 | None = None
    top_n_tokens: Unsigned | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


class Generate(Struct, kw_only=True):
    """POST /generate, /generate_stream and /tokenize, which looks at the parameters' types alone.

    Absent parameters are not the same as empty ones.
    """

    inputs: str
    parameters: Parameters | UnsetType = UNSET


class CompatGenerate(Generate, kw_only=True):
    """POST /."""

    stream: bool = False


class FunctionCall(Struct, kw_only=True):
    """A function's name with arguments: JSON, or a text that holds it."""

    name: str
    arguments: Any = None


class ToolCall(Struct, kw_only=True):
    """A call that the assistant made."""

    function: FunctionCall
    id: str = ""
    type: str = "function"


class Message(Struct, kw_only=True):
    """A turn of a conversation; `content` is a text or a list of parts."""

    role: str
    content: Any = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Struct, kw_only=True):
    """A function that may be called. The schema has two names: OpenAI's and the contract's."""

    name: str
    description: str | None = None
    parameters: Any = None
    arguments: Any = None


class Tool(Struct, kw_only=True):
    """A tool: always a function."""

    type: str
    function: Function


class JsonSchema(Struct, kw_only=True):
    """OpenAI's form of a schema."""

    schema: Any = None


class ResponseFormat(Struct, kw_only=True):
    """A constraint on an answer: TGI's form (type, value) or OpenAI's (type, json_schema).

    Others write `schema` beside the type `json_object`.
    """

    type: Literal["json", "json_object", "json_schema", "regex", "text"]
    value: Any = None
    json_schema: JsonSchema | None = None
    schema: Any = None


class StreamOptions(Struct, kw_only=True):
    """What else a stream shall contain."""

    include_usage: bool | None = None


class Chat(_Body, kw_only=True):
    """POST /v1/chat/completions and /chat_tokenize."""

    messages: list[Message]
    model: str | None = None
    frequency_penalty: Float | None = None
    logit_bias: Biases | list[float] | None = None  # a list is the contract's, and not used
    logprobs: bool | None = None
    top_logprobs: Unsigned | None = None
    max_tokens: Unsigned | None = None
    max_completion_tokens: Unsigned | None = None
    n: Unsigned | None = None
    presence_penalty: Float | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: Unsigned64 | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    tools: list[Tool] | None = None
    tool_prompt: str | UnsetType | None = UNSET  # null is an empty text
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    min_p: Float | None = None
    min_tokens: Unsigned | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Unsigned] | None = None
    priority: Signed | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    documents: list[Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    escape_special_tokens: bool | None = None


class Completions(_Body, kw_only=True):
    """POST /v1/completions."""

    # Texts, one prompt's tokens, or several's.
    prompt: str | Annotated[list[str | Unsigned | list[Unsigned]], Meta(min_length=1)]
    model: str | None = None
    max_tokens: Unsigned | None = None
    n: Unsigned | None = None
    best_of: Unsigned | None = None  # only as many as are returned
    logprobs: Unsigned | None = None  # how many of the likeliest tokens: OpenAI's older form
    echo: bool | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: Unsigned64 | None = None
    suffix: str | None = None
    repetition_penalty: Float | None = None
    frequency_penalty: Float | None = None
    stop: str | list[str] | None = None
    min_p: Float | None = None
    min_tokens: Unsigned | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Unsigned] | None = None
    logit_bias: Biases | None = None
    priority: Signed | None = None


class Invocation(Struct, kw_only=True):
    """POST /invocations: which of the endpoints a body is for, by the field that is there."""

    inputs: Any = UNSET
    messages: Any = UNSET
    prompt: Any = UNSET


@cache
def _conversions(kind: type[_Body]) -> tuple[tuple[str, Callable[[Any], int | float]], ...]:
    """The names of the fields that are converted, and how: floats and seeds."""
    by_type: dict[Any, Callable[[Any], int | float]] = {
        Float | None: float32,
        Unsigned64 | None: int,
    }
    fields = structs.fields(kind)
    return tuple((field.name, by_type[field.type]) for field in fields if field.type in by_type)


def float32(value: float) -> float:
    """The nearest float32."""
    (rounded,) = _FLOAT32.unpack(_FLOAT32.pack(value))
    return float(rounded)


class LoadAdapter(Struct, kw_only=True):
    """An adapter to load, as vLLM has it."""

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool | None = None


class UnloadAdapter(Struct, kw_only=True):
    """An adapter to unload, as vLLM has it."""

    lora_name: str | None = None
