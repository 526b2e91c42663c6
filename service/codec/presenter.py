"""The two forms of every reply: typed messages for gRPC callers, rendered bytes for REST callers.

The servicer treats both alike and asks the call's presenter for each message. A REST message is
already serialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import betterproto2

from engine.protocol.adapters import AdapterInfo

from ..error_bodies import ErrorFormat
from ..errors import ServiceError
from ..generation.generation import Generation, TokenEvent
from ..generation.server_info import ServerInfo
from ..openai.chat_answer import ChatAnswer, ChatDelta
from ..openai.completions import CompletionAnswer, CompletionDelta
from ..openai.responses.event import Event
from ..openai.responses.response import Response
from ..openai.responses.stream import ResponseStream
from ..openai.usage import StreamUsage
from ..pb.google.api import HttpBody
from ..pb.tokenwire import v1 as pb
from ..text.tokenizer import TokenSpan
from . import convert, framing, render, whole
from .responses import convert as convert_responses
from .responses import render as render_responses

Reply = betterproto2.Message | bytes
_TEXT = "text/plain; charset=utf-8"
InvocationKind = Literal["generate", "chat", "completions"]


class Presenter(Protocol):
    """Turns results into replies of the RPC that the method is named after."""

    def generate(self, result: Generation) -> Reply:
        """Generate."""

    def generate_stream(self, event: TokenEvent) -> Reply:
        """GenerateStream: a token."""

    def compat_generate(self, result: Generation) -> Reply:
        """CompatGenerate without a stream."""

    def compat_generate_stream(self, event: TokenEvent) -> Reply:
        """CompatGenerate with a stream: a token."""

    def chat(self, answers: Sequence[ChatAnswer]) -> Reply:
        """Chat without a stream: all answers to the conversation."""

    def chat_stream(self, delta: ChatDelta) -> Reply:
        """Chat with a stream: a part of the answer."""

    def completions(self, answer: CompletionAnswer) -> Reply:
        """Completions without a stream."""

    def completions_stream(self, delta: CompletionDelta) -> Reply:
        """Completions with a stream: one token of one prompt's continuation."""

    def chat_usage(self, usage: StreamUsage) -> Reply:
        """Chat with a stream: its usage, at its end."""

    def completions_usage(self, usage: StreamUsage) -> Reply:
        """Completions with a stream: its usage, at its end."""

    def response(self, response: Response) -> Reply:
        """Responses without a stream."""

    def response_event(self, event: Event) -> Reply:
        """Responses with a stream: what is new."""

    def response_failure(self, stream: ResponseStream, error: ServiceError) -> Sequence[Reply]:
        """Responses with a stream: a failure, as its last messages or raised again."""

    def tokenize(self, spans: list[TokenSpan]) -> bytes:
        """Tokenize."""

    def chat_tokenize(self, prompt: str, spans: list[TokenSpan]) -> bytes:
        """ChatTokenize."""

    def list_models(self, server: ServerInfo) -> Reply:
        """ListModels."""

    def get_model(self, server: ServerInfo, name: str) -> Reply:
        """GetModel: the model or an adapter, by the name that is served."""

    def adapter_loaded(self, adapter: AdapterInfo) -> Reply:
        """LoadAdapter."""

    def adapter_unloaded(self, name: str) -> Reply:
        """UnloadAdapter."""

    def invocation(self, kind: InvocationKind, reply: Reply) -> Reply:
        """Invocations: wraps the reply of the RPC that was chosen."""

    def info(self, server: ServerInfo, replayed_share: float | None) -> Reply:
        """Info."""

    def health(self) -> Reply:
        """Health, for a healthy server."""

    def stream_error(self, error: ServiceError) -> Reply:
        """A failure inside a stream: as a message of the stream, or raised again."""

    def stream_failure(self, error: ServiceError) -> Sequence[Reply]:
        """The same as all messages that end the stream: one."""

    def stream_end(self) -> Reply | None:
        """The message that marks the end of an OpenAI stream, if there is one."""

    def keep_alive(self) -> Reply | None:
        """The message that a silent stream sends to stay open, if one is needed."""


class TypedPresenter:
    """For gRPC callers."""

    def generate(self, result: Generation) -> Reply:
        """See Presenter."""
        return whole.generate_response(result)

    def generate_stream(self, event: TokenEvent) -> Reply:
        """See Presenter."""
        if event.generation is None and not event.top_tokens:
            return framing.stream_response(event.number, event.token)
        return convert.stream_response(event)

    def compat_generate(self, result: Generation) -> Reply:
        """See Presenter."""
        return framing.sized(b"\x0a", whole.generate_response(result))

    def compat_generate_stream(self, event: TokenEvent) -> Reply:
        """See Presenter."""
        if event.generation is None and not event.top_tokens:
            return framing.compat_event(event.number, event.token)
        return pb.CompatGenerateResponse(event=convert.stream_response(event))

    def chat(self, answers: Sequence[ChatAnswer]) -> Reply:
        """See Presenter."""
        return pb.ChatResponse(completion=convert.chat_completion(answers))

    def chat_stream(self, delta: ChatDelta) -> Reply:
        """See Presenter."""
        has_more = delta.reasoning or delta.call is not None or delta.logprobs is not None
        if not has_more and delta.finish_reason is None:
            return framing.chat_chunk(delta)
        return pb.ChatResponse(chunk=convert.chat_chunk(delta))

    def completions(self, answer: CompletionAnswer) -> Reply:
        """See Presenter."""
        return pb.CompletionsResponse(completion=convert.completion(answer))

    def completions_stream(self, delta: CompletionDelta) -> Reply:
        """See Presenter."""
        return pb.CompletionsResponse(completion=convert.completion_chunk(delta))

    def chat_usage(self, usage: StreamUsage) -> Reply:
        """See Presenter."""
        return pb.ChatResponse(chunk=convert.chat_usage(usage))

    def completions_usage(self, usage: StreamUsage) -> Reply:
        """See Presenter."""
        return pb.CompletionsResponse(completion=convert.completion_usage(usage))

    def response(self, response: Response) -> Reply:
        """See Presenter."""
        return pb.ResponsesResponse(response=convert_responses.response(response))

    def response_event(self, event: Event) -> Reply:
        """See Presenter."""
        return pb.ResponsesResponse(event=convert_responses.event(event))

    def response_failure(self, stream: ResponseStream, error: ServiceError) -> Sequence[Reply]:
        """Raised: a gRPC stream ends with a status."""
        raise error

    def tokenize(self, spans: list[TokenSpan]) -> bytes:
        """See Presenter."""
        return framing.tokenize_response(spans)

    def chat_tokenize(self, prompt: str, spans: list[TokenSpan]) -> bytes:
        """See Presenter."""
        return framing.chat_tokenize_response(prompt, spans)

    def list_models(self, server: ServerInfo) -> Reply:
        """See Presenter."""
        return convert.models_response(server)

    def get_model(self, server: ServerInfo, name: str) -> Reply:
        """See Presenter."""
        return convert.model_response(server, name)

    def adapter_loaded(self, adapter: AdapterInfo) -> Reply:
        """See Presenter."""
        return pb.LoadAdapterResponse(adapter=convert.adapter(adapter))

    def adapter_unloaded(self, name: str) -> Reply:
        """See Presenter."""
        return pb.UnloadAdapterResponse()

    def invocation(self, kind: InvocationKind, reply: Reply) -> Reply:
        """See Presenter."""
        return framing.invocations_response(kind, bytes(reply))

    def info(self, server: ServerInfo, replayed_share: float | None) -> Reply:
        """See Presenter."""
        return convert.info_response(server, replayed_share)

    def health(self) -> Reply:
        """See Presenter."""
        return pb.HealthResponse()

    def stream_error(self, error: ServiceError) -> Reply:
        """Raised: a gRPC stream ends with a status."""
        raise error

    def stream_failure(self, error: ServiceError) -> Sequence[Reply]:
        """Likewise."""
        raise error

    def stream_end(self) -> Reply | None:
        """Nothing: a gRPC stream ends by itself."""
        return None

    def keep_alive(self) -> Reply | None:
        """Nothing: HTTP/2 has pings."""
        return None


class RestPresenter:
    """For REST callers, whose replies the gateway passes on as they are.

    Args:
        error_format: the form of errors inside streams.
    """

    def __init__(self, error_format: ErrorFormat = "tgi") -> None:
        self._error_format = error_format

    def generate(self, result: Generation) -> Reply:
        """See Presenter."""
        return framing.http_reply(render.JSON, render.generation(result))

    def generate_stream(self, event: TokenEvent) -> Reply:
        """See Presenter."""
        return _event(render.token_event(event))

    def compat_generate(self, result: Generation) -> Reply:
        """A list of one: TGI's answer on `/`."""
        return framing.http_reply(render.JSON, render.generation_list(result))

    compat_generate_stream = generate_stream

    def chat(self, answers: Sequence[ChatAnswer]) -> Reply:
        """See Presenter."""
        return framing.http_reply(render.JSON, render.chat_completion(answers))

    def chat_stream(self, delta: ChatDelta) -> Reply:
        """See Presenter."""
        return _event(render.chat_chunk(delta))

    def completions(self, answer: CompletionAnswer) -> Reply:
        """See Presenter."""
        return framing.http_reply(render.JSON, render.completion(answer))

    def completions_stream(self, delta: CompletionDelta) -> Reply:
        """See Presenter."""
        return _event(render.completion_chunk(delta))

    def chat_usage(self, usage: StreamUsage) -> Reply:
        """See Presenter."""
        return _event(render.chat_usage(usage))

    def completions_usage(self, usage: StreamUsage) -> Reply:
        """See Presenter."""
        return _event(render.completion_usage(usage))

    def response(self, response: Response) -> Reply:
        """See Presenter."""
        return framing.http_reply(render.JSON, render_responses.response(response))

    def response_event(self, event: Event) -> Reply:
        """An event with a name, as OpenAI sends it."""
        return framing.http_reply(render.SSE, render_responses.event(event))

    def response_failure(self, stream: ResponseStream, error: ServiceError) -> Sequence[Reply]:
        """The event `error`, and the response that failed."""
        return [self.response_event(event) for event in stream.fail(error)]

    def tokenize(self, spans: list[TokenSpan]) -> bytes:
        """See Presenter."""
        return framing.http_reply(render.JSON, render.tokens(spans))

    def chat_tokenize(self, prompt: str, spans: list[TokenSpan]) -> bytes:
        """See Presenter."""
        return framing.http_reply(render.JSON, render.chat_tokens(prompt, spans))

    def list_models(self, server: ServerInfo) -> Reply:
        """See Presenter."""
        return framing.http_reply(render.JSON, render.models(server))

    def get_model(self, server: ServerInfo, name: str) -> Reply:
        """See Presenter."""
        return framing.http_reply(render.JSON, render.model(server, name))

    def adapter_loaded(self, adapter: AdapterInfo) -> Reply:
        """The text of vLLM."""
        text = f"Success: LoRA adapter '{adapter.name}' added successfully."
        return framing.http_reply(_TEXT, text.encode())

    def adapter_unloaded(self, name: str) -> Reply:
        """The text of vLLM."""
        text = f"Success: LoRA adapter '{name}' removed successfully."
        return framing.http_reply(_TEXT, text.encode())

    def invocation(self, kind: InvocationKind, reply: Reply) -> Reply:
        """The same bytes: `http` is field 15 of every reply."""
        return reply

    def info(self, server: ServerInfo, replayed_share: float | None) -> Reply:
        """See Presenter."""
        return framing.http_reply(render.JSON, render.info(server, replayed_share))

    def health(self) -> Reply:
        """An empty body; it has a content type because HTTP expects one."""
        return framing.http_reply(_TEXT, b"")

    def stream_error(self, error: ServiceError) -> Reply:
        """An event, as in TGI: the status 200 was sent already."""
        return _event(render.error(error, self._error_format))

    def stream_failure(self, error: ServiceError) -> Sequence[Reply]:
        """See Presenter."""
        return [self.stream_error(error)]

    def stream_end(self) -> Reply | None:
        """The event that OpenAI's clients wait for."""
        return framing.http_reply(render.SSE, render.DONE)

    def keep_alive(self) -> Reply | None:
        """A comment, which clients skip."""
        return framing.http_reply(render.SSE, render.KEEP_ALIVE)


def document(content_type: str, data: bytes) -> Reply:
    """A file; the same for both transports."""
    return HttpBody(content_type=content_type, data=data)


def _event(payload: bytes) -> bytes:
    return framing.http_reply(render.SSE, render.sse(payload))
