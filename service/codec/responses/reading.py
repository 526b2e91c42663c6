"""From the wire to the domain: a body of POST /v1/responses, or a message of Responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import ErrorKind, ServiceError, missing_field
from ...generation.limits import Limits, check_count
from ...generation.parameters import Parameters
from ...grammar.spec import Grammar
from ...openai.chat import ChatRequest
from ...openai.responses.request import ResponsesRequest
from ...openai.template_fields import TemplateFields
from ...openai.tools import Tool
from ...pb.tokenwire import v1 as pb
from ..bodies import float32
from ..counts import check_counts
from ..plain import plain
from ..strict_json import parse
from . import body
from .input_items import Input

Wire = body.Responses | pb.ResponsesRequest

LOGPROBS = "message.output_text.logprobs"
# What else OpenAI's clients ask for by default: it belongs to items that an answer here never has,
# or, like encrypted reasoning, to reasoning that is told openly.
_NO_INCLUDES = frozenset({
    "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
})  # fmt: skip
_STATE = "nothing is stored: send the whole conversation in `input`"
_REFUSED = {
    "previous_response_id": _STATE,
    "conversation": _STATE,
    "prompt": "there are no stored prompts: send `instructions` and `input`",
    "background": "an answer is made while its caller waits; it must not be true",
}
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512  # entries, characters: OpenAI's bounds
_CHOICES = ("auto", "none", "required")
_FORMATS = ("text", "json_object", "json_schema")


def request_of_body(data: bytes, limits: Limits) -> ResponsesRequest:
    """The request that a body is.

    Raises:
        ServiceError: it is malformed, or asks for what there is not.
    """
    wire = parse(data, body.Responses)
    check_counts(wire, limits)
    _check_refused(wire)
    return responses_request(wire)


def request_of_message(message: pb.ResponsesRequest) -> ResponsesRequest:
    """The request that a message is.

    Raises:
        ServiceError: it is malformed, or asks for what there is not.
    """
    return responses_request(message)


def responses_request(wire: Wire) -> ResponsesRequest:
    """A conversation to continue."""
    _check_metadata(wire.metadata or {})
    given = plain(wire.input)
    if given is None:
        raise missing_field("input")
    if not isinstance(given, str | list):
        text = "input: expected a string or a list"
        raise ServiceError(ErrorKind.SHAPE, text, field="input")
    said = Input.of(given, wire.instructions)
    return ResponsesRequest(
        chat=_chat(wire, said), repeated=_repeated(wire), arguments=tuple(said.arguments)
    )


def _chat(wire: Wire, said: Input) -> ChatRequest:
    text = wire.text
    constraint = None if text is None or text.format is None else _format(text.format)
    return ChatRequest(
        messages=tuple(said.messages),
        stream=bool(wire.stream),
        logprobs=_wants_logprobs(wire),
        tools=_tools(wire.tools or ()),
        tool_choice=_tool_choice(plain(wire.tool_choice)),
        parallel_tool_calls=wire.parallel_tool_calls is not False,
        tool_call_format="openai",
        reads_markdown=False,
        template=_template_fields(wire),
        parameters=_parameters(wire, constraint),
    )


def _parameters(wire: Wire, constraint: Grammar | None) -> Parameters:
    """OpenAI's reading: a temperature of 0 is greedy, and without a limit the text may fill all."""
    is_greedy = wire.temperature == 0.0
    temperature = None if is_greedy or wire.temperature is None else float32(wire.temperature)
    top_p = None if wire.top_p is None or wire.top_p == 1.0 else float32(wire.top_p)
    return Parameters(
        do_sample=not is_greedy,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=wire.max_output_tokens,
        top_n_tokens=wire.top_logprobs,
        grammar=constraint,
        adapter_id=wire.model,
        names_model=True,
        details=True,
    )


def _template_fields(wire: Wire) -> TemplateFields:
    verbosity = None if wire.text is None else wire.text.verbosity
    return TemplateFields(
        kwargs={} if verbosity is None else {"verbosity": verbosity},
        reasoning_effort=None if wire.reasoning is None else wire.reasoning.effort,
    )


def _wants_logprobs(wire: Wire) -> bool:
    """Whether log-probabilities are wanted; a number of the likeliest tokens asks for them, too.

    Raises:
        ServiceError: something else is to be included.
    """
    for index, name in enumerate(wire.include or ()):
        if name != LOGPROBS and name not in _NO_INCLUDES:
            text = f"include[{index}] must be `{LOGPROBS}`. Given: {name}"
            raise ServiceError(ErrorKind.VALIDATION, text, field=f"include[{index}]")
    return LOGPROBS in (wire.include or ()) or bool(wire.top_logprobs)


def _tools(wire: Sequence[body.ResponseTool | pb.ResponseTool]) -> tuple[Tool, ...]:
    return tuple(_tool(index, item) for index, item in enumerate(wire))


def _tool(index: int, wire: body.ResponseTool | pb.ResponseTool) -> Tool:
    path = f"tools[{index}]"
    if wire.type != "function":
        text = f"{path}.type must be `function`: the server runs no tools. Given: {wire.type}"
        raise ServiceError(ErrorKind.VALIDATION, text, field=f"{path}.type")
    if wire.name is None:
        raise missing_field(f"{path}.name")
    schema = plain(wire.parameters)
    return Tool(name=wire.name, description=wire.description, parameters=schema)


def _tool_choice(choice: Any) -> Any:
    """The same choice in the form of a chat.

    Raises:
        ServiceError: it is none that can be made.
    """
    if choice is None or choice in _CHOICES:
        return choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        if isinstance(name := choice.get("name"), str):
            return {"function": {"name": name}}
        raise missing_field("tool_choice.name")
    text = '`tool_choice` must be `auto`, `none`, `required` or {"type": "function", "name"}'
    raise ServiceError(ErrorKind.VALIDATION, text, field="tool_choice")


def _format(wire: body.ResponseTextFormat | pb.ResponseTextFormat) -> Grammar | None:
    """The constraint on a text.

    Raises:
        ServiceError: it is none that can be made.
    """
    if wire.type not in _FORMATS:
        known = ", ".join(f"`{name}`" for name in _FORMATS)
        text = f"`text.format.type` must be one of {known}. Given: {wire.type}"
        raise ServiceError(ErrorKind.VALIDATION, text, field="text.format.type")
    if wire.type == "text":
        return None
    schema = plain(wire.schema) if wire.type == "json_schema" else {"type": "object"}
    if schema is None:
        raise missing_field("text.format.schema")
    return Grammar(kind="json", value=schema)


def _check_refused(wire: body.Responses) -> None:
    """Refuses what needs stored state.

    Raises:
        ServiceError: it is asked for.
    """
    for name, why in _REFUSED.items():
        if getattr(wire, name) not in (None, False):
            text = f"`{name}` is not supported: {why}"
            raise ServiceError(ErrorKind.VALIDATION, text, field=name)
    if wire.truncation not in (None, "disabled"):
        text = "`truncation` must be `disabled`: no part of a conversation is left out"
        raise ServiceError(ErrorKind.VALIDATION, text, field="truncation")


def _check_metadata(metadata: dict[str, str]) -> None:
    check_count("metadata", len(metadata), _MAX_METADATA, "entries")
    for name, value in metadata.items():
        if len(name) > _MAX_KEY or len(value) > _MAX_VALUE:
            text = f"`metadata` may have names of {_MAX_KEY} and values of {_MAX_VALUE} characters"
            raise ServiceError(ErrorKind.VALIDATION, text, field="metadata")


def _repeated(wire: Wire) -> dict[str, Any]:
    """The fields that an answer repeats, as JSON, with the values in force."""
    if isinstance(wire, pb.ResponsesRequest):
        return {"metadata": dict(wire.metadata)}
    return {
        "background": False,
        "instructions": wire.instructions,
        "max_output_tokens": wire.max_output_tokens,
        "max_tool_calls": wire.max_tool_calls,
        "metadata": wire.metadata or {},
        "parallel_tool_calls": wire.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": wire.prompt_cache_key,
        "reasoning": _repeated_reasoning(wire.reasoning),
        "safety_identifier": wire.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if wire.temperature is None else wire.temperature,
        "text": _repeated_text(wire.text),
        "tool_choice": wire.tool_choice or "auto",
        "tools": [_repeated_tool(tool) for tool in wire.tools or ()],
        "top_logprobs": wire.top_logprobs or 0,
        "top_p": 1.0 if wire.top_p is None else wire.top_p,
        "truncation": "disabled",
        "user": wire.user,
    }


def _repeated_reasoning(wire: body.ResponseReasoning | None) -> dict[str, Any]:
    effort, summary = (None, None) if wire is None else (wire.effort, wire.summary)
    return {"effort": effort, "summary": summary}


def _repeated_text(wire: body.ResponseTextConfig | None) -> dict[str, Any]:
    form = {"type": "text"} if wire is None or wire.format is None else _as_given(wire.format)
    verbosity = {} if wire is None or wire.verbosity is None else {"verbosity": wire.verbosity}
    return {"format": form, **verbosity}


def _as_given(wire: body.ResponseTextFormat) -> dict[str, Any]:
    if wire.type != "json_schema":
        return {"type": wire.type}
    return {
        "type": wire.type,
        "name": wire.name,
        "description": wire.description,
        "schema": wire.schema,
        "strict": wire.strict is not False,
    }


def _repeated_tool(wire: body.ResponseTool) -> dict[str, Any]:
    return {
        "type": wire.type,
        "name": wire.name,
        "description": wire.description,
        "parameters": wire.parameters,
        "strict": wire.strict is not False,
    }
