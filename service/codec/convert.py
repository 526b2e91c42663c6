"""Converts the generated messages to domain requests, and results to generated messages.

It checks no limits. Only this folder, `api` and `bench` know the generated messages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from ..errors import ErrorKind, ServiceError, missing_field
from ..generation.generator import Generation, PrefillToken, Token, TokenEvent
from ..generation.parameters import DEFAULT_MAX_NEW_TOKENS, Parameters
from ..generation.server_info import ServerInfo
from ..grammar.spec import Grammar
from ..openai.chat import (
    ChatAnswer,
    ChatDelta,
    ChatRequest,
    Message,
    ToolCallFormat,
)
from ..openai.completions import CompletionAnswer, CompletionDelta, CompletionsRequest
from ..openai.tool_calls import ToolCall
from ..openai.tools import Tool
from ..openai.usage import StreamUsage, Usage
from ..pb.google.protobuf import ListValue, NullValue, Struct, Value
from ..pb.tokenwire import v1 as pb

# TGI adds this to presence_penalty and takes the sum as repetition_penalty:
# router/src/server.rs at v2.1.1, chat_completions.
_PRESENCE_SHIFT = 2.0

# Kinds of grammars by their names on the wire.
_KINDS = {"json": "json", "json_object": "json", "json_schema": "json", "regex": "regex"}
_FINISH_REASONS = {
    "length": pb.FinishReason.LENGTH,
    "eos_token": pb.FinishReason.EOS_TOKEN,
    "stop_sequence": pb.FinishReason.STOP_SEQUENCE,
}


Invocation = pb.CompatGenerateRequest | pb.ChatRequest | pb.CompletionsRequest


def parameters(message: pb.GenerateParameters | None) -> Parameters:
    """The parameters of `/generate`. If the whole message is absent, TGI samples."""
    if message is None:
        return Parameters(do_sample=True)
    return Parameters(
        best_of=message.best_of,
        temperature=message.temperature,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        top_k=message.top_k,
        top_p=message.top_p,
        typical_p=message.typical_p,
        do_sample=bool(message.do_sample),
        max_new_tokens=_or_default(message.max_new_tokens),
        return_full_text=message.return_full_text,
        stop=tuple(message.stop),
        truncate=message.truncate,
        watermark=bool(message.watermark),
        details=bool(message.details),
        decoder_input_details=bool(message.decoder_input_details),
        seed=message.seed,
        top_n_tokens=message.top_n_tokens,
        grammar=_grammar(message.grammar),
        adapter_id=message.adapter_id,
    )


def chat_request(message: pb.ChatRequest, tool_call_format: ToolCallFormat = "tgi") -> ChatRequest:
    """A conversation to continue."""
    response_format = _response_format(message.response_format)
    return ChatRequest(
        messages=tuple(_message(item) for item in message.messages),
        stream=message.stream,
        logprobs=bool(message.logprobs),
        n=message.n,
        include_usage=_include_usage(message.stream_options),
        tools=tuple(_tool(item) for item in message.tools),
        tool_choice=plain(message.tool_choice),
        tool_prompt=message.tool_prompt,
        tool_call_format=tool_call_format,
        response_format=response_format,
        parameters=_chat_parameters(message, response_format),
    )


def _chat_parameters(message: pb.ChatRequest, response_format: Grammar | None) -> Parameters:
    """The parameters of a conversation under their names in `/generate`."""
    presence_penalty = message.presence_penalty
    max_tokens = message.max_completion_tokens
    if max_tokens is None:
        max_tokens = message.max_tokens  # its older name
    return Parameters(
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=None if presence_penalty is None else presence_penalty + _PRESENCE_SHIFT,
        max_new_tokens=_or_default(max_tokens),
        stop=tuple(message.stop),
        seed=message.seed,
        top_p=message.top_p,
        top_n_tokens=message.top_logprobs,
        grammar=response_format,
        adapter_id=message.model,
        details=True,
        **_temperature(message.temperature),
    )


def completions_request(message: pb.CompletionsRequest) -> CompletionsRequest:
    """Prompts to continue."""
    return CompletionsRequest(
        prompts=tuple(message.prompt),
        stream=message.stream,
        suffix=message.suffix,
        include_usage=_include_usage(message.stream_options),
        parameters=Parameters(
            frequency_penalty=message.frequency_penalty,
            repetition_penalty=message.repetition_penalty,
            max_new_tokens=_or_default(message.max_tokens),
            stop=tuple(message.stop),
            seed=message.seed,
            top_p=message.top_p,
            adapter_id=message.model,
            details=True,
            **_temperature(message.temperature),
        ),
    )


def invocation(message: pb.InvocationsRequest) -> Invocation:
    """The request that the fields which are set belong to.

    Raises:
        ServiceError: they belong to none, or to more than one.
    """
    choices: dict[str, tuple[bool, type[Any]]] = {
        "inputs": (message.inputs is not None, pb.CompatGenerateRequest),
        "messages": (bool(message.messages), pb.ChatRequest),
        "prompt": (bool(message.prompt), pb.CompletionsRequest),
    }
    meant = [message_class for is_set, message_class in choices.values() if is_set]
    if not meant:
        raise missing_field("inputs")
    if len(meant) > 1:
        given = " and ".join(f"`{name}`" for name, (is_set, _) in choices.items() if is_set)
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"one of `inputs`, `messages` and `prompt` must be set. Given: {given}",
        )
    (message_class,) = meant
    names = [item.name for item in fields(message_class)]
    meant_message: Invocation = message_class(**{name: getattr(message, name) for name in names})
    return meant_message


def plain(value: Value | None) -> Any:
    """A `Value` as plain JSON values, whole numbers as integers: on the wire all are doubles."""
    match value:
        case Value(list_value=ListValue(values=items)):
            return [plain(item) for item in items]
        case Value(struct_value=Struct(fields=fields)):
            return {key: plain(item) for key, item in fields.items()}
        case Value(number_value=float(number)):
            return int(number) if number.is_integer() else number
        case Value(string_value=str(text)):
            return text
        case Value(bool_value=bool(truth)):
            return truth
    return None  # null, or no kind is set


def to_value(item: Any) -> Value:
    """Plain JSON values as a `Value`."""
    if isinstance(item, bool):
        return Value(bool_value=item)
    if isinstance(item, (int, float)):
        return Value(number_value=float(item))
    if isinstance(item, str):
        return Value(string_value=item)
    if isinstance(item, dict):
        return Value(struct_value=Struct(fields={key: to_value(v) for key, v in item.items()}))
    if isinstance(item, list):
        return Value(list_value=ListValue(values=[to_value(v) for v in item]))
    return Value(null_value=NullValue.NULL_VALUE)


def generate_response(result: Generation) -> pb.GenerateResponse:
    """A whole answer."""
    response = pb.GenerateResponse(generated_text=result.generated_text)
    if result.request.wants_details:
        response.details = pb.Details(
            best_of_sequences=[_best_of_sequence(item) for item in result.best_of_sequences],
            **_summary(result),
        )
    return response


def stream_response(index: int, event: TokenEvent) -> pb.GenerateStreamResponse:
    """One token of a stream."""
    response = pb.GenerateStreamResponse(
        index=index, token=_token(event.token), top_tokens=_tokens(event.top_tokens)
    )
    result = event.generation
    if result is not None:
        response.generated_text = result.generated_text
        if result.request.details:
            response.details = pb.StreamDetails(
                finish_reason=_FINISH_REASONS[result.finish_reason],
                generated_tokens=len(result.tokens),
                seed=result.seed,
            )
    return response


def chat_completion(answer: ChatAnswer) -> pb.ChatCompletion:
    """A whole answer."""
    choice = pb.ChatChoice(
        message=_assistant_message(answer),
        logprobs=_chat_logprobs(answer.logprobs),
        finish_reason=answer.finish_reason,
    )
    return pb.ChatCompletion(
        **_head(answer.created, answer.server),
        choices=[choice],
        usage=_usage(answer.usage),
    )


def chat_chunk(delta: ChatDelta) -> pb.ChatCompletionChunk:
    """One token of an answer."""
    choice = pb.ChatChunkChoice(
        delta=_assistant_delta(delta),
        logprobs=_chat_logprobs(delta.logprobs),
        finish_reason=delta.finish_reason,
    )
    return pb.ChatCompletionChunk(
        **_head(delta.created, delta.server),
        choices=[choice],
    )


def completion(answer: CompletionAnswer) -> pb.Completion:
    """All continuations."""
    return pb.Completion(
        **_head(answer.created, answer.server),
        choices=[
            pb.CompletionChoice(
                index=index, text=result.generated_text, finish_reason=result.finish_reason
            )
            for index, result in enumerate(answer.generations)
        ],
        usage=_usage(answer.usage),
    )


def completion_chunk(delta: CompletionDelta) -> pb.Completion:
    """One token of one continuation."""
    return pb.Completion(
        **_head(delta.created, delta.server),
        choices=[pb.CompletionChoice(index=delta.index, text=delta.text)],
    )


def chat_usage(part: StreamUsage) -> pb.ChatCompletionChunk:
    """The last chunk of a stream, with its usage."""
    return pb.ChatCompletionChunk(
        **_head(part.created, part.server),
        usage=_usage(part.usage),
    )


def completion_usage(part: StreamUsage) -> pb.Completion:
    """The last chunk of a stream, with its usage."""
    return pb.Completion(
        **_head(part.created, part.server),
        usage=_usage(part.usage),
    )


def models_response(server: ServerInfo) -> pb.ListModelsResponse:
    """The one model."""
    name = server.model_id
    return pb.ListModelsResponse(
        object="list", data=[pb.Model(id=name, object="model", owned_by=name)]
    )


def info_response(server: ServerInfo) -> pb.InfoResponse:
    """The model and the limits."""
    return pb.InfoResponse(**server.to_contract(), max_top_n_tokens=server.limits.max_top_n_tokens)


def _or_default(max_new_tokens: int | None) -> int:
    return DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens


def _temperature(value: float | None) -> dict[str, Any]:
    """As OpenAI reads a temperature: exactly 0 is greedy, all else samples."""
    if value == 0.0:
        return {"do_sample": False, "temperature": None}
    return {"do_sample": True, "temperature": value}


def _grammar(message: pb.Grammar | None) -> Grammar | None:
    if message is None:
        return None
    return Grammar(kind=_KINDS.get(str(message.type.name), ""), value=plain(message.value))


def _response_format(message: pb.ResponseFormat | None) -> Grammar | None:
    if message is None or message.type == pb.ResponseFormatType.text:
        return None
    value = plain(message.json_schema.schema if message.json_schema else message.value)
    if message.type == pb.ResponseFormatType.json_object and value is None:
        value = {"type": "object"}  # OpenAI's form: any object
    return Grammar(kind=_KINDS.get(str(message.type.name), ""), value=value)


def _message(message: pb.Message) -> Message:
    return Message(
        role=message.role,
        content=plain(message.content),
        name=message.name,
        tool_calls=tuple(_tool_call(call) for call in message.tool_calls),
        tool_call_id=message.tool_call_id,
    )


def _tool(message: pb.Tool) -> Tool:
    function = message.function or pb.FunctionDefinition()
    schema = function.arguments if function.parameters is None else function.parameters
    return Tool(name=function.name, description=function.description, parameters=plain(schema))


def _assistant_message(answer: ChatAnswer) -> pb.AssistantMessage:
    if answer.call is None:
        return pb.AssistantMessage(role="assistant", content=answer.text)
    call = answer.call
    function = pb.FunctionCall(name=call.name, arguments=_call_arguments(call, answer))
    made = pb.ToolCall(id=answer.call_id, type="function", function=function)
    return pb.AssistantMessage(role="assistant", tool_calls=[made])


def _call_arguments(call: ToolCall, answer: ChatAnswer) -> Value:
    """The arguments: parsed in the contract's form if a `Value` can hold them, else as text."""
    if answer.tool_call_format == "tgi":
        with suppress(ValueError, OverflowError, RecursionError):
            # Integers are parsed as floats, since a `Value` has doubles only.
            return to_value(json.loads(call.arguments, parse_int=float))
    return to_value(call.arguments)


def _assistant_delta(delta: ChatDelta) -> pb.AssistantMessage:
    if delta.call is None:
        return pb.AssistantMessage(role="assistant", content=delta.text)
    call = delta.call
    function = pb.FunctionCall(name=call.name or "", arguments=Value(string_value=call.arguments))
    made = pb.ToolCall(id=delta.call_id, type="function", function=function)
    return pb.AssistantMessage(role="assistant", tool_calls=[made])


def _tool_call(call: pb.ToolCall) -> dict[str, Any]:
    function = call.function or pb.FunctionCall()
    return {
        "id": call.id,
        "type": call.type or "function",
        "function": {"name": function.name, "arguments": plain(function.arguments)},
    }


def _token(token: Token) -> pb.Token:
    return pb.Token(id=token.id, text=token.text, logprob=token.logprob, special=token.special)


def _tokens(tokens: Sequence[Token]) -> list[pb.Token]:
    return [_token(token) for token in tokens]


def _token_lists(steps: Sequence[Sequence[Token]]) -> list[pb.TokenList]:
    return [pb.TokenList(tokens=_tokens(step)) for step in steps]


def _prefill(tokens: Sequence[PrefillToken]) -> list[pb.PrefillToken]:
    return [
        pb.PrefillToken(id=token.id, text=token.text, logprob=token.logprob) for token in tokens
    ]


def _best_of_sequence(result: Generation) -> pb.BestOfSequence:
    return pb.BestOfSequence(generated_text=result.generated_text, **_summary(result))


def _summary(result: Generation) -> dict[str, Any]:
    """The fields that Details and BestOfSequence share."""
    return {
        "finish_reason": _FINISH_REASONS[result.finish_reason],
        "generated_tokens": len(result.tokens),
        "seed": result.seed,
        "prefill": _prefill(result.prefill),
        "tokens": _tokens(result.tokens),
        "top_tokens": _token_lists(result.top_tokens),
    }


def _head(created: int, server: ServerInfo) -> dict[str, Any]:
    """The fields that every answer of OpenAI's endpoints begins with."""
    return {
        "created": created,
        "model": server.model_id,
        "system_fingerprint": server.system_fingerprint,
    }


def _include_usage(options: pb.StreamOptions | None) -> bool:
    return options is not None and bool(options.include_usage)


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_completion_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_completion_tokens,
    )


def _chat_logprobs(entries: list[tuple[Token, list[Token]]] | None) -> pb.ChatLogprobs | None:
    if entries is None:
        return None
    return pb.ChatLogprobs(
        content=[
            pb.ChatLogprob(
                token=token.text,
                logprob=token.logprob,
                top_logprobs=[
                    pb.ChatTopLogprob(token=other.text, logprob=other.logprob) for other in tops
                ],
            )
            for token, tops in entries
        ]
    )
