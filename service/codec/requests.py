"""From the wire to the domain: a REST body or a gRPC message becomes the same request.

Both have the same fields under the same names, so one function reads both. What is absent stays
absent; defaults are filled in by validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from msgspec import UNSET, UnsetType

from engine.protocol.adapters import LoadAdapter

from ..errors import ErrorKind, ServiceError, missing_field
from ..generation.limits import Limits
from ..generation.parameters import DEFAULT_MAX_NEW_TOKENS, Parameters, Prompt, TextRequest
from ..grammar.spec import Grammar
from ..openai.chat import ChatRequest, Message
from ..openai.completions import CompletionsRequest
from ..openai.responses.request import ResponsesRequest
from ..openai.template_fields import TemplateFields
from ..openai.tools import Tool
from ..pb.tokenwire import v1 as pb
from ..workers.courtesy import giving_way
from . import bodies
from .counts import check_counts
from .image_fields import images_of, parts_of
from .plain import plain
from .responses.reading import request_of_body, request_of_message
from .strict_json import parse

Request = (
    TextRequest
    | ChatRequest
    | CompletionsRequest
    | ResponsesRequest
    | LoadAdapter
    | str
    | float
    | None
)

# presence_penalty is shifted so: TGI, router/src/server.rs at v2.1.1, chat_completions.
_PRESENCE_SHIFT = 2.0

# Kinds of grammars by their names on the wire.
_KINDS = {"json": "json", "json_object": "json", "json_schema": "json", "regex": "regex"}
_FIRST_FIELDS = ("inputs", "messages", "prompt")  # of the bodies that `/invocations` takes


@dataclass(frozen=True, slots=True)
class Reader:
    """How the requests of an RPC are read: from the body of a REST call, or from its message.

    Raises (both):
        ServiceError: the request has not the shape of one.
    """

    from_body: Callable[[bytes, Limits], Request]
    from_message: Callable[[Any], Request]


def text_request(
    wire: bodies.Generate | bodies.CompatGenerate | pb.GenerateRequest | pb.CompatGenerateRequest,
) -> TextRequest:
    """A text to continue."""
    return TextRequest(
        inputs=_inputs(wire),
        parameters=parameters(wire.parameters),
        stream=bool(getattr(wire, "stream", False)),
        images=() if isinstance(wire, bodies.Generate) else images_of(wire.images),
    )


def parameters(wire: bodies.Parameters | pb.GenerateParameters | UnsetType | None) -> Parameters:
    """The parameters of `/generate`. Absent as a whole they mean sampling: TGI's rule."""
    if wire is None or isinstance(wire, UnsetType):
        return Parameters(do_sample=True)
    return Parameters(
        best_of=wire.best_of,
        temperature=wire.temperature,
        repetition_penalty=wire.repetition_penalty,
        frequency_penalty=wire.frequency_penalty,
        top_k=wire.top_k,
        top_p=wire.top_p,
        typical_p=wire.typical_p,
        min_p=wire.min_p,
        do_sample=bool(wire.do_sample),
        max_new_tokens=_max_new_tokens(wire),
        min_new_tokens=wire.min_new_tokens,
        ignore_eos=bool(wire.ignore_eos),
        stop_token_ids=tuple(wire.stop_token_ids),
        return_full_text=wire.return_full_text,
        stop=tuple(wire.stop),
        truncate=wire.truncate,
        watermark=bool(wire.watermark),
        details=bool(wire.details),
        decoder_input_details=bool(wire.decoder_input_details),
        seed=wire.seed,
        top_n_tokens=wire.top_n_tokens,
        grammar=_grammar(wire.grammar),
        adapter_id=wire.adapter_id,
        logit_bias=_biases(wire.logit_bias),
        priority=wire.priority,
        detokenize=getattr(wire, "detokenize", None) is not False,
    )


def chat_request(wire: bodies.Chat | pb.ChatRequest) -> ChatRequest:
    """A conversation to continue."""
    response_format = _response_format(wire.response_format)
    presence = wire.presence_penalty
    max_tokens = wire.max_completion_tokens
    turns: Sequence[bodies.Message | pb.Message] = wire.messages
    return ChatRequest(
        messages=tuple(_message(index, item) for index, item in enumerate(giving_way(turns))),
        stream=wire.stream,
        logprobs=bool(wire.logprobs),
        n=wire.n,
        include_usage=_include_usage(wire.stream_options),
        tools=tuple(giving_way(_tool(item) for item in wire.tools or ())),
        tool_choice=plain(wire.tool_choice),
        parallel_tool_calls=wire.parallel_tool_calls is not False,
        tool_prompt=_tool_prompt(wire),
        template=_template_fields(wire),
        escape_special_tokens=wire.escape_special_tokens,
        parameters=Parameters(
            repetition_penalty=None if presence is None else presence + _PRESENCE_SHIFT,
            max_new_tokens=_or_default(wire.max_tokens if max_tokens is None else max_tokens),
            top_n_tokens=wire.top_logprobs,
            grammar=response_format,
            **_shared_parameters(wire),
        ),
    )


def _template_fields(wire: bodies.Chat | pb.ChatRequest) -> TemplateFields:
    """What is said to the chat template beside messages and tools."""
    return TemplateFields(
        kwargs=plain(wire.chat_template_kwargs) or {},
        reasoning_effort=wire.reasoning_effort,
        documents=tuple(plain(item) for item in wire.documents or ()),
        add_generation_prompt=wire.add_generation_prompt,
        continue_final_message=wire.continue_final_message,
    )


def completions_of_body(wire: bodies.Completions) -> CompletionsRequest:
    """Prompts to continue, for a REST caller.

    Raises:
        ServiceError: more texts are to be made than returned. gRPC callers have no such field.
    """
    if wire.best_of not in (None, wire.n or 1):
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"`best_of` must be `n` on this path. Given: {wire.best_of}. /generate has a `best_of`",
            field="best_of",
        )
    return completions_request(wire)


def completions_request(wire: bodies.Completions | pb.CompletionsRequest) -> CompletionsRequest:
    """Prompts to continue."""
    top_n, echo = _top_logprobs(wire), bool(wire.echo)
    scores_prompt = echo and top_n is not None
    # One token is generated and left out of the answer: the engine has no requests without one.
    is_prompt_alone = echo and wire.max_tokens == 0
    return CompletionsRequest(
        prompts=_prompts(wire),
        stream=wire.stream,
        suffix=wire.suffix,
        n=wire.n,
        logprobs=top_n is not None,
        echo=echo,
        is_prompt_alone=is_prompt_alone,
        include_usage=_include_usage(wire.stream_options),
        parameters=Parameters(
            repetition_penalty=wire.repetition_penalty,
            max_new_tokens=1 if is_prompt_alone else _or_default(wire.max_tokens),
            top_n_tokens=top_n,
            return_full_text=echo or None,
            decoder_input_details=scores_prompt,
            prompt_top_n_tokens=top_n or 0 if scores_prompt else 0,
            **_shared_parameters(wire),
        ),
    )


def invocation_of_body(data: bytes, limits: Limits) -> Request:
    """The request that a body of `/invocations` is."""
    which = parse(data, bodies.Invocation)
    there = [name for name in _FIRST_FIELDS if getattr(which, name) is not UNSET]
    given = {name: getattr(which, name) not in (None, [], UNSET) for name in _FIRST_FIELDS}
    name = there[0] if len(there) == 1 else _only(given) if there else "inputs"
    return {"inputs": COMPAT, "messages": CHAT, "prompt": COMPLETIONS}[name].from_body(data, limits)


def invocation_of_message(message: pb.InvocationsRequest) -> Request:
    """The request that a message of Invocations is."""
    given = {
        "inputs": message.inputs is not None or message.input_ids is not None,
        "messages": bool(message.messages),
        "prompt": bool(message.prompt or message.prompt_ids),
    }
    match _only(given):
        case "inputs":
            return text_request(_part(message, pb.CompatGenerateRequest))
        case "messages":
            return chat_request(_part(message, pb.ChatRequest))
        case _:
            return completions_request(_part(message, pb.CompletionsRequest))


def _body(kind: type[Any], convert: Callable[[Any], Request]) -> Callable[[bytes, Limits], Request]:
    def read(data: bytes, limits: Limits) -> Request:
        wire = parse(data, kind)
        check_counts(wire, limits)
        return convert(wire)

    return read


def load_adapter(wire: bodies.LoadAdapter | pb.LoadAdapterRequest) -> LoadAdapter:
    """An adapter to load."""
    return LoadAdapter(
        name=_required(wire.lora_name, "lora_name"),
        source=_required(wire.lora_path, "lora_path"),
        replaces=bool(wire.load_inplace),
    )


def _adapter_name(wire: bodies.UnloadAdapter | pb.UnloadAdapterRequest) -> str:
    return _required(wire.lora_name, "lora_name")


def _text(wire: bodies.Generate | pb.TokenizeRequest) -> str:
    return _required(wire.inputs, "inputs")


def _nothing(_: Any) -> None:
    return None


def _no_body(_: bytes, __: Limits) -> None:
    return None


TEXT = Reader(_body(bodies.Generate, text_request), text_request)
COMPAT = Reader(_body(bodies.CompatGenerate, text_request), text_request)
CHAT = Reader(_body(bodies.Chat, chat_request), chat_request)
TO_TOKENIZE = Reader(_body(bodies.Generate, _text), _text)
LOAD = Reader(_body(bodies.LoadAdapter, load_adapter), load_adapter)
UNLOAD = Reader(_body(bodies.UnloadAdapter, _adapter_name), _adapter_name)
COMPLETIONS = Reader(_body(bodies.Completions, completions_of_body), completions_request)

# By the name of the RPC. Those that are not here are asked nothing.
READERS = {
    "Generate": TEXT,
    "GenerateStream": TEXT,
    "CompatGenerate": COMPAT,
    "Chat": CHAT,
    "ChatTokenize": CHAT,
    "ChatTokenizeStream": CHAT,
    "Completions": COMPLETIONS,
    "Responses": Reader(request_of_body, request_of_message),
    "Invocations": Reader(invocation_of_body, invocation_of_message),
    "ChatUnary": CHAT,
    "CompletionsUnary": COMPLETIONS,
    "Tokenize": TO_TOKENIZE,
    "TokenizeStream": TO_TOKENIZE,
    "LoadAdapter": LOAD,
    "UnloadAdapter": UNLOAD,
    "Docs": Reader(_no_body, lambda message: message.asset),
    "GetModel": Reader(_no_body, lambda message: _required(message.id or None, "id")),
    "Abort": Reader(_no_body, lambda message: message.request_id),
    "WatchLoad": Reader(_no_body, lambda message: message.interval_seconds),
}
NOTHING = Reader(_no_body, _nothing)


def _required(value: str | None, name: str) -> str:
    """A field that must be there.

    Raises:
        ServiceError: it is not.
    """
    if value is None:
        raise missing_field(name)
    return value


def _inputs(
    wire: bodies.Generate | bodies.CompatGenerate | pb.GenerateRequest | pb.CompatGenerateRequest,
) -> Prompt:
    """The prompt of `/generate`: a text, or from gRPC callers the ids of its tokens.

    Raises:
        ServiceError: there is none, or both are given.
    """
    if isinstance(wire, bodies.Generate) or wire.input_ids is None:
        return _required(wire.inputs, "inputs")
    if wire.inputs is not None:
        raise _both("inputs", "input_ids")
    return tuple(wire.input_ids.ids)


def _prompts(wire: bodies.Completions | pb.CompletionsRequest) -> tuple[Prompt, ...]:
    """The prompts of `/v1/completions`: texts, or the ids of their tokens.

    Raises:
        ServiceError: both are given.
    """
    if isinstance(wire, bodies.Completions):
        return _prompts_of_body(wire.prompt)
    if wire.prompt and wire.prompt_ids:
        raise _both("prompt", "prompt_ids")
    return tuple(wire.prompt) or tuple(tuple(item.ids) for item in wire.prompt_ids)


def _prompts_of_body(wire: str | list[str | int | list[int]]) -> tuple[Prompt, ...]:
    """One prompt or several; a list of numbers is one.

    Raises:
        ServiceError: texts, numbers and lists are mixed.
    """
    if isinstance(wire, str):
        return (wire,)
    if len(set(map(type, wire))) > 1:
        text = "prompt: texts, numbers and lists must not be mixed"
        raise ServiceError(ErrorKind.SHAPE, text, field="prompt")
    token_ids = tuple(item for item in wire if isinstance(item, int))
    if token_ids:
        return (token_ids,)
    return tuple(tuple(item) if isinstance(item, list) else str(item) for item in wire)


def _top_logprobs(wire: bodies.Completions | pb.CompletionsRequest) -> int | None:
    """How many of the likeliest tokens to report at each place; None without log-probabilities."""
    if isinstance(wire, bodies.Completions):
        return wire.logprobs
    return (wire.top_logprobs or 0) if wire.logprobs else None


def _both(name: str, other: str) -> ServiceError:
    return ServiceError(
        ErrorKind.VALIDATION, f"only one of `{name}` and `{other}` may be set", field=other
    )


def _biases(wire: dict[int, float] | list[float] | None) -> tuple[tuple[int, float], ...]:
    """What is added to the logits, by token id."""
    if not isinstance(wire, dict):
        return ()
    return tuple((token_id, bodies.float32(wire[token_id])) for token_id in sorted(wire))


def _only(given: dict[str, bool]) -> str:
    """The one field of several that is given.

    Raises:
        ServiceError: none is, or more than one.
    """
    names = [name for name, is_given in given.items() if is_given]
    if not names:
        raise missing_field("inputs")
    if len(names) > 1:
        listed = " and ".join(f"`{name}`" for name in names)
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"one of `inputs`, `messages` and `prompt` must be set. Given: {listed}",
        )
    return names[0]


def _part(message: pb.InvocationsRequest, kind: type[Any]) -> Any:
    """The message of another RPC, whose fields all are among those of Invocations."""
    return kind(**{item.name: getattr(message, item.name) for item in fields(kind)})


def _max_new_tokens(wire: bodies.Parameters | pb.GenerateParameters) -> int | None:
    """None means as many tokens as fit: that is what null means in a body, and only there."""
    if isinstance(wire, bodies.Parameters):
        return DEFAULT_MAX_NEW_TOKENS if wire.max_new_tokens is UNSET else wire.max_new_tokens
    return _or_default(wire.max_new_tokens)


def _tool_prompt(wire: bodies.Chat | pb.ChatRequest) -> str | None:
    """None means the default text; null in a body means no text."""
    if isinstance(wire, bodies.Chat):
        return None if wire.tool_prompt is UNSET else wire.tool_prompt or ""
    return wire.tool_prompt


def _or_default(max_new_tokens: int | None) -> int:
    return DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens


def _texts(wire: str | list[str] | None) -> tuple[str, ...]:
    """A list of texts, which REST callers may write as one text."""
    return (wire,) if isinstance(wire, str) else tuple(wire or ())


def _shared_parameters(
    wire: bodies.Chat | pb.ChatRequest | bodies.Completions | pb.CompletionsRequest,
) -> dict[str, Any]:
    """The parameters that OpenAI's endpoints have in common."""
    return {
        "frequency_penalty": wire.frequency_penalty,
        "stop": _texts(wire.stop),
        "seed": wire.seed,
        "top_p": wire.top_p,
        "adapter_id": wire.model,
        "names_model": True,
        "min_p": wire.min_p,
        "min_new_tokens": wire.min_tokens,
        "ignore_eos": bool(wire.ignore_eos),
        "stop_token_ids": tuple(wire.stop_token_ids or ()),
        "logit_bias": _biases(wire.logit_bias),
        "priority": wire.priority,
        "details": True,
        **_temperature(wire.temperature),
    }


def _temperature(value: float | None) -> dict[str, Any]:
    """OpenAI's reading: exactly 0 is greedy, everything else samples."""
    if value == 0.0:
        return {"do_sample": False, "temperature": None}
    return {"do_sample": True, "temperature": value}


def _type(wire: str | pb.GrammarType | pb.ResponseFormatType) -> str:
    """The type of a constraint as REST spells it."""
    return wire if isinstance(wire, str) else str(wire.name).lower()


def _grammar(wire: bodies.Grammar | pb.Grammar | None) -> Grammar | None:
    if wire is None:
        return None
    return Grammar(kind=_KINDS.get(_type(wire.type), ""), value=plain(wire.value))


def _response_format(wire: bodies.ResponseFormat | pb.ResponseFormat | None) -> Grammar | None:
    if wire is None or (name := _type(wire.type)) == "text":
        return None
    value = _constraint_value(wire, name)
    if name == "json_object" and value is None:
        value = {"type": "object"}  # OpenAI's form: any object
    return Grammar(kind=_KINDS.get(name, ""), value=value)


def _constraint_value(wire: bodies.ResponseFormat | pb.ResponseFormat, name: str) -> Any:
    """The schema or expression of a format, which has three names.

    Raises:
        ServiceError: two of them are given, or one that the type does not have.
    """
    named = {"value": wire.value, "json_schema": wire.json_schema, "schema": wire.schema}
    given = [key for key, value in named.items() if value is not None]
    if len(given) > 1:
        raise _both(f"response_format.{given[0]}", f"response_format.{given[1]}")
    if name == "regex" and wire.value is None and given:
        path = f"response_format.{given[0]}"
        raise ServiceError(ErrorKind.VALIDATION, f"`{path}` is not for the type regex", field=path)
    value = named[given[0]] if given else None
    return plain(wire.json_schema.schema if wire.json_schema else value)


def _message(index: int, wire: bodies.Message | pb.Message) -> Message:
    return Message(
        role=wire.role,
        content=_content(f"messages[{index}]", wire),
        name=wire.name,
        tool_calls=tuple(_tool_call(call) for call in wire.tool_calls or ()),
        tool_call_id=wire.tool_call_id,
        reasoning_content=wire.reasoning_content,
    )


def _content(path: str, wire: bodies.Message | pb.Message) -> Any:
    """What is said: JSON, or from gRPC callers typed parts.

    Raises:
        ServiceError: both are given, or a part is empty.
    """
    if isinstance(wire, bodies.Message) or not wire.parts:
        return plain(wire.content)
    if wire.content is not None:
        raise _both(f"{path}.content", f"{path}.parts")
    return parts_of(f"{path}.parts", wire.parts)


def _tool_call(wire: bodies.ToolCall | pb.ToolCall) -> dict[str, Any]:
    function = wire.function or pb.FunctionCall()
    return {
        "id": wire.id,
        "type": wire.type or "function",
        "function": {"name": function.name, "arguments": plain(function.arguments)},
    }


def _tool(wire: bodies.Tool | pb.Tool) -> Tool:
    function = wire.function or pb.FunctionDefinition()
    by_contract = function.parameters is None and function.arguments is not None
    schema = function.arguments if by_contract else function.parameters
    return Tool(
        name=function.name,
        description=function.description,
        parameters=plain(schema),
        by_contract=by_contract,
    )


def _include_usage(wire: bodies.StreamOptions | pb.StreamOptions | None) -> bool:
    return wire is not None and bool(wire.include_usage)
