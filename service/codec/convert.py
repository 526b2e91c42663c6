"""Converts the generated messages to domain requests, and results to generated messages.

It checks no limits. Only this folder, `api` and `bench` know the generated messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from engine.protocol.adapters import AdapterInfo

from ..call_record import current_record
from ..generation.generation import Generation, PrefillToken, Token, TokenEvent
from ..generation.load import Load
from ..generation.server_info import ServerInfo
from ..openai.chat_answer import (
    ChatAnswer,
    ChatDelta,
    Scored,
)
from ..openai.completion_logprobs import ScoredToken
from ..openai.completions import CompletionAnswer, CompletionDelta
from ..openai.finish_reasons import finish_word
from ..openai.head import Head
from ..openai.tool_calls import ToolCall
from ..openai.usage import StreamUsage, Usage
from ..pb.google.protobuf import Value
from ..pb.tokenwire import v1 as pb

_FINISH_REASONS = {
    "length": pb.FinishReason.LENGTH,
    "eos_token": pb.FinishReason.EOS_TOKEN,
    "stop_sequence": pb.FinishReason.STOP_SEQUENCE,
    "tool_calls": pb.FinishReason.TOOL_CALLS,
}


# The limits on counts, by their names in Info.
_COUNTS = (
    "max_request_values",
    "max_messages",
    "max_message_parts",
    "max_tools",
    "max_stop_sequence_bytes",
    "max_tokenize_bytes",
    "max_choices",
    "max_images",
    "max_image_bytes",
    "max_image_pixels",
    "fetches_images",
)


def generate_response(result: Generation) -> pb.GenerateResponse:
    """A whole answer."""
    response = pb.GenerateResponse(
        generated_text=result.generated_text,
        token_ids=[token.id for token in result.tokens],
        **end(result),
    )
    if result.request.wants_details:
        response.details = pb.Details(
            best_of_sequences=[_best_of_sequence(item) for item in result.best_of_sequences],
            **_summary(result),
        )
    return response


def stream_response(event: TokenEvent) -> pb.GenerateStreamResponse:
    """One token of a stream."""
    response = pb.GenerateStreamResponse(
        index=event.number, token=_token(event.token), top_tokens=_tokens(event.top_tokens)
    )
    result = event.generation
    if result is not None:
        for name, value in end(result).items():
            setattr(response, name, value)
        response.generated_text = result.generated_text
        if result.request.details:
            response.details = pb.StreamDetails(
                finish_reason=_FINISH_REASONS[result.finish_reason],
                generated_tokens=len(result.tokens),
                seed=result.seed,
            )
    return response


def chat_completion(answers: Sequence[ChatAnswer]) -> pb.ChatCompletion:
    """All answers to a conversation."""
    choices = [
        pb.ChatChoice(
            index=index,
            message=_assistant_message(answer),
            logprobs=_chat_logprobs(answer.logprobs),
            matched_stop=_stop_match(answer.matched_stop),
            **_finish(answer.finish_reason),
        )
        for index, answer in enumerate(answers)
    ]
    return pb.ChatCompletion(
        **_head(answers[0].head),
        choices=choices,
        usage=_usage(Usage.together(answer.usage for answer in answers)),
        request_id=_request_id(),
    )


def chat_chunk(delta: ChatDelta) -> pb.ChatCompletionChunk:
    """One token of an answer."""
    result = delta.generation
    choice = pb.ChatChunkChoice(
        index=delta.index,
        delta=_assistant_delta(delta),
        logprobs=_chat_logprobs(delta.logprobs),
        matched_stop=None if result is None else _stop_match(result.matched_stop),
        **_finish(delta.finish_reason),
    )
    return pb.ChatCompletionChunk(**_head(delta.head), choices=[choice], **_cost(result))


def completion(answer: CompletionAnswer) -> pb.Completion:
    """All continuations."""
    return pb.Completion(
        **_head(answer.head),
        choices=[
            pb.CompletionChoice(
                index=index,
                text=result.generated_text,
                logprobs=_completion_logprobs(logprobs),
                matched_stop=_stop_match(result.matched_stop),
                **_finish(result.finish_reason),
            )
            for index, (result, logprobs) in enumerate(answer.scored)
        ],
        usage=_usage(answer.usage),
        request_id=_request_id(),
    )


def completion_chunk(delta: CompletionDelta) -> pb.Completion:
    """One token of one continuation."""
    result = delta.generation
    choice = pb.CompletionChoice(
        index=delta.index,
        text=delta.text,
        logprobs=_completion_logprobs(delta.logprobs),
        matched_stop=None if result is None else _stop_match(result.matched_stop),
        **_finish(delta.finish_reason),
    )
    return pb.Completion(**_head(delta.head), choices=[choice], **_cost(result))


def chat_usage(part: StreamUsage) -> pb.ChatCompletionChunk:
    """The last chunk of a stream, with its usage."""
    return pb.ChatCompletionChunk(
        **_head(part.head),
        usage=_usage(part.usage),
    )


def completion_usage(part: StreamUsage) -> pb.Completion:
    """The last chunk of a stream, with its usage."""
    return pb.Completion(
        **_head(part.head),
        usage=_usage(part.usage),
    )


def models_response(server: ServerInfo) -> pb.ListModelsResponse:
    """The model, and the adapters beside it."""
    return pb.ListModelsResponse(
        object="list", data=[_model(server, name) for name in server.model_names]
    )


def model_response(server: ServerInfo, name: str) -> pb.GetModelResponse:
    """The model, or an adapter."""
    return pb.GetModelResponse(model=_model(server, name))


def info_response(server: ServerInfo, replayed_share: float | None) -> pb.InfoResponse:
    """The model, the limits, and the part of the steps that were replayed from recordings."""
    return pb.InfoResponse(
        **server.to_contract(),
        max_top_n_tokens=server.limits.max_top_n_tokens,
        vocab_size=server.engine.vocab_size,
        eos_token_ids=sorted(server.eos_token_ids),
        adapter_ids=list(server.adapters.names),
        notes=list(server.engine.notes),
        ranks=[pb.RankMemory(**rank._asdict()) for rank in server.ranks],
        context_length=server.engine.max_total_tokens,
        replayed_share=replayed_share,
        **{name: getattr(server.limits, name) for name in _COUNTS},
    )


def adapter(info: AdapterInfo) -> pb.Adapter:
    """An adapter that is loaded."""
    return pb.Adapter(name=info.name, path=info.source, sha256=info.digest, rank=info.rank)


def adapters_response(server: ServerInfo) -> pb.ListAdaptersResponse:
    """All adapters that are loaded."""
    return pb.ListAdaptersResponse(
        adapters=[adapter(info) for info in server.adapters.served().values()],
        max_adapters=server.engine.max_adapters,
    )


def load_response(load: Load) -> pb.GetLoadResponse:
    """How busy the server is."""
    return pb.GetLoadResponse(
        running=load.num_running,
        waiting=load.num_waiting,
        kv_cache_use=load.kv_cache_use,
        tokens_per_second=load.tokens_per_s,
    )


def abort_response(num_aborted: int) -> pb.AbortResponse:
    """What an abort has ended."""
    return pb.AbortResponse(aborted=num_aborted)


def _model(server: ServerInfo, name: str) -> pb.Model:
    return pb.Model(id=name, object="model", owned_by=server.model_id)


def _assistant_message(answer: ChatAnswer) -> pb.AssistantMessage:
    made = [_tool_call(call) for call in answer.calls]
    return pb.AssistantMessage(
        role="assistant",
        content=answer.text if answer.text or not made else None,
        tool_calls=made,
        reasoning_content=answer.reasoning or None,
    )


def _tool_call(call: ToolCall) -> pb.ToolCall:
    function = pb.FunctionCall(name=call.name, arguments=Value(string_value=call.arguments))
    return pb.ToolCall(id=call.id, type="function", function=function)


def _assistant_delta(delta: ChatDelta) -> pb.AssistantMessage:
    if delta.reasoning:
        return pb.AssistantMessage(role="assistant", reasoning_content=delta.reasoning)
    if delta.call is None:
        return pb.AssistantMessage(role="assistant", content=delta.text)
    call = delta.call
    function = pb.FunctionCall(name=call.name or "", arguments=Value(string_value=call.arguments))
    made = pb.ToolCall(
        id=delta.call_id, type="function", function=function, index=call.index or None
    )
    return pb.AssistantMessage(role="assistant", tool_calls=[made])


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


def head(result: Generation) -> dict[str, Any]:
    """The fields of Details and of BestOfSequence that are no lists."""
    return {
        "finish_reason": _FINISH_REASONS[result.finish_reason],
        "generated_tokens": len(result.tokens),
        "seed": result.seed,
    }


def _summary(result: Generation) -> dict[str, Any]:
    """The fields that Details and BestOfSequence share."""
    return {
        **head(result),
        "prefill": _prefill(result.prefill),
        "tokens": _tokens(result.tokens),
        "top_tokens": _token_lists(result.top_tokens),
    }


def _head(head: Head) -> dict[str, Any]:
    """The fields that every answer of OpenAI's endpoints begins with."""
    return asdict(head)


def _finish(reason: str | None) -> dict[str, Any]:
    """Why an answer of OpenAI's endpoints ended, in OpenAI's word and exactly, as an enum.

    Nothing if it goes on.
    """
    if reason is None:
        return {}
    return {"finish_reason": finish_word(reason), "reason": _FINISH_REASONS[reason]}


def end(result: Generation) -> dict[str, Any]:
    """What both forms of an answer to `/generate` have at their end."""
    num_generated = sum(len(item.tokens) for item in (result, *result.best_of_sequences))
    usage = Usage(result.num_prompt_tokens, num_generated, result.num_cached_tokens)
    return {
        "finish_reason": _FINISH_REASONS[result.finish_reason],
        "matched_stop": _stop_match(result.matched_stop),
        "usage": _usage(usage),
        "request_id": _request_id(),
    }


def _cost(result: Generation | None) -> dict[str, Any]:
    """What the last part of an answer has beside its choice; nothing if it goes on."""
    if result is None:
        return {}
    return {"usage": _usage(Usage.of([result])), "request_id": _request_id()}


def _stop_match(stop: str | int | None) -> pb.StopMatch | None:
    if stop is None:
        return None
    return pb.StopMatch(sequence=stop) if isinstance(stop, str) else pb.StopMatch(token_id=stop)


def _request_id() -> str:
    """The id of the call that is being answered."""
    record = current_record()
    return "" if record is None else record.request_id


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_completion_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_completion_tokens,
        cached_tokens=usage.num_cached_tokens,
    )


def _completion_logprobs(scored: list[ScoredToken] | None) -> pb.CompletionLogprobs | None:
    if scored is None:
        return None
    return pb.CompletionLogprobs(
        content=[
            pb.CompletionLogprob(
                token=token.text,
                logprob=token.logprob,
                top_logprobs=[
                    pb.ChatTopLogprob(token=text, logprob=logprob)
                    for text, logprob in (token.tops or {}).items()
                ],
                text_offset=token.offset,
            )
            for token in scored
        ]
    )


def _chat_logprobs(entries: Scored | None) -> pb.ChatLogprobs | None:
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
