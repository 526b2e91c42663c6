"""The options of requests, by the names of their fields in the protos, which say what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypedDict


class Grammar(TypedDict):
    """A constraint on a text: a JSON Schema (as an object, or as text) or a regular expression."""

    type: Literal["json", "json_object", "regex"]
    value: Any


# A file, or the fields of Image: {"data", "mime_type"} or {"url"}.
Image = bytes | Mapping[str, Any]


class GenerateOptions(TypedDict, total=False):
    """How to continue a text: GenerateParameters, and the images that its Markdown shows."""

    images: Sequence[Image]

    best_of: int
    temperature: float
    repetition_penalty: float
    frequency_penalty: float
    top_k: int
    top_p: float
    typical_p: float
    min_p: float
    do_sample: bool
    max_new_tokens: int
    min_new_tokens: int
    ignore_eos: bool
    return_full_text: bool
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    logit_bias: Mapping[int, float]
    priority: int
    detokenize: bool
    request_id: str
    truncate: int
    watermark: bool
    details: bool
    decoder_input_details: bool
    seed: int
    top_n_tokens: int
    grammar: Grammar | Mapping[str, Any]
    adapter_id: str


Prompt = str | Sequence[int]  # a text, or the ids of its tokens


class ChatMessage(TypedDict, total=False):
    """One turn of a conversation, in OpenAI's form: Message.

    `parts` are texts and images, instead of `content`.
    """

    role: Required[str]
    content: str | Sequence[Mapping[str, Any]] | None
    parts: Sequence[str | Image]
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str
    reasoning_content: str


class ResponseFormat(TypedDict, total=False):
    """A constraint on an answer: TGI's form (type, value) or OpenAI's (type, json_schema).

    `schema` is another name of `value`; only one of the three may be set.
    """

    type: Required[Literal["json", "regex", "json_object", "json_schema", "text"]]
    value: Any
    json_schema: Mapping[str, Any]
    schema: Any


class ChatOptions(TypedDict, total=False):
    """How to continue a conversation: ChatRequest."""

    model: str
    frequency_penalty: float
    logprobs: bool
    top_logprobs: int
    max_tokens: int
    n: int
    presence_penalty: float
    stop: Sequence[str]
    seed: int
    temperature: float
    top_p: float
    tools: Sequence[Mapping[str, Any]]
    tool_prompt: str
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    chat_template_kwargs: Mapping[str, Any]
    reasoning_effort: str
    documents: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    escape_special_tokens: bool
    response_format: ResponseFormat | Mapping[str, Any]
    min_p: float
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: Sequence[int]
    logit_bias: Mapping[int, float]
    priority: int
    request_id: str
    include_usage: bool


class CompletionsOptions(TypedDict, total=False):
    """How to continue prompts: CompletionsRequest."""

    model: str
    max_tokens: int
    n: int
    logprobs: bool
    top_logprobs: int
    echo: bool
    temperature: float
    top_p: float
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    stop: Sequence[str]
    min_p: float
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: Sequence[int]
    logit_bias: Mapping[int, float]
    priority: int
    request_id: str
    include_usage: bool
