"""The synchronous client. It may be used by several threads at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Self, TypeVar, Unpack

import grpc

from . import requests, rpcs
from .connection import Connection
from .errors import UnavailableError, error_of, no_answer
from .messages import (
    Adapter,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    GenerateResponse,
    GenerateStreamResponse,
    GetLoadResponse,
    InfoResponse,
    SimpleToken,
)
from .options import ChatMessage, ChatOptions, CompletionsOptions, GenerateOptions, Prompt
from .pb import adapters_pb2, server_pb2, tokenize_pb2
from .rpcs import Q, R, Rpc

T = TypeVar("T")


class Client(Connection):
    """A connection for synchronous callers; `Connection` has the arguments and the errors."""

    _grpc = grpc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and all calls."""
        self._channel.close()

    def generate(
        self, inputs: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerateResponse:
        """Continues a text. Greedy, unless an option asks for sampling."""
        return self._unary(rpcs.GENERATE, requests.generate(inputs, options), timeout_s)

    def generate_stream(
        self, inputs: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[GenerateStreamResponse]:
        """Continues a text, token by token; the last message has the whole text."""
        request = requests.generate(inputs, options)
        return self._stream(rpcs.GENERATE_STREAM, request, timeout_s, lambda reply: reply)

    def chat(
        self,
        messages: Iterable[ChatMessage | Mapping[str, Any]],
        *,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion:
        """Continues a conversation."""
        request = requests.chat(messages, options, stream=False)
        return self._only(rpcs.CHAT, request, timeout_s, lambda reply: reply.completion)

    def chat_stream(
        self,
        messages: Iterable[ChatMessage | Mapping[str, Any]],
        *,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Generator[ChatCompletionChunk]:
        """Continues a conversation, token by token."""
        request = requests.chat(messages, options, stream=True)
        return self._stream(rpcs.CHAT, request, timeout_s, lambda reply: reply.chunk)

    def completions(
        self,
        prompts: str | Iterable[Prompt],
        *,
        timeout_s: float | None = None,
        **options: Unpack[CompletionsOptions],
    ) -> Completion:
        """Continues one or several prompts."""
        request = requests.completions(prompts, options, stream=False)
        return self._only(rpcs.COMPLETIONS, request, timeout_s, lambda reply: reply.completion)

    def completions_stream(
        self,
        prompts: str | Iterable[Prompt],
        *,
        timeout_s: float | None = None,
        **options: Unpack[CompletionsOptions],
    ) -> Generator[Completion]:
        """Continues prompts, token by token; a choice has the number of its prompt."""
        request = requests.completions(prompts, options, stream=True)
        return self._stream(rpcs.COMPLETIONS, request, timeout_s, lambda reply: reply.completion)

    def tokenize(self, text: str, *, timeout_s: float | None = None) -> list[SimpleToken]:
        """The tokens of a text."""
        request = tokenize_pb2.TokenizeRequest(inputs=text)
        return list(self._unary(rpcs.TOKENIZE, request, timeout_s).tokens)

    def info(self, *, timeout_s: float | None = None) -> InfoResponse:
        """The model that is served, and every limit in force."""
        return self._unary(rpcs.INFO, server_pb2.InfoRequest(), timeout_s)

    def load(self, *, timeout_s: float | None = None) -> GetLoadResponse:
        """How busy the server is."""
        return self._unary(rpcs.GET_LOAD, server_pb2.GetLoadRequest(), timeout_s)

    def watch_load(
        self, interval_s: float | None = None, *, timeout_s: float | None = None
    ) -> Generator[GetLoadResponse]:
        """How busy the server is, again and again until the server ends or the caller leaves."""
        request = server_pb2.WatchLoadRequest(interval_seconds=interval_s)
        return self._stream(rpcs.WATCH_LOAD, request, timeout_s, lambda reply: reply)

    def abort(self, request_id: str, *, timeout_s: float | None = None) -> int:
        """Ends the calls that were given this id; returns how many generations that were."""
        request = server_pb2.AbortRequest(request_id=request_id)
        return (self._unary(rpcs.ABORT, request, timeout_s)).aborted

    def load_adapter(
        self, name: str, path: str, *, replaces: bool = False, timeout_s: float | None = None
    ) -> Adapter:
        """Loads an adapter, with an admin's key; `replaces` lets one of the same name give way."""
        request = adapters_pb2.LoadAdapterRequest(
            lora_name=name, lora_path=path, load_inplace=replaces
        )
        return (self._unary(rpcs.LOAD_ADAPTER, request, timeout_s)).adapter

    def unload_adapter(self, name: str, *, timeout_s: float | None = None) -> None:
        """Takes an adapter away, with an admin's key; the requests that use it end with it."""
        request = adapters_pb2.UnloadAdapterRequest(lora_name=name)
        self._unary(rpcs.UNLOAD_ADAPTER, request, timeout_s)

    def adapters(self, *, timeout_s: float | None = None) -> list[Adapter]:
        """The adapters that are loaded, for an admin's key."""
        request = adapters_pb2.ListAdaptersRequest()
        return list((self._unary(rpcs.LIST_ADAPTERS, request, timeout_s)).adapters)

    def health(self, *, timeout_s: float | None = None) -> bool:
        """Whether the server can be reached and accepts requests."""
        try:
            self._unary(rpcs.HEALTH, server_pb2.HealthRequest(), timeout_s)
        except UnavailableError:
            return False
        return True

    def _unary(self, rpc: Rpc[Q, R], request: Q, timeout_s: float | None) -> R:
        stub = self._channel.unary_unary(
            rpc.path, rpc.request.SerializeToString, rpc.reply.FromString
        )
        try:
            reply: R = stub(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return reply

    def _stream(
        self, rpc: Rpc[Q, R], request: Q, timeout_s: float | None, part: Callable[[R], T]
    ) -> Generator[T]:
        """The part of each reply that callers get."""
        stub = self._channel.unary_stream(
            rpc.path, rpc.request.SerializeToString, rpc.reply.FromString
        )
        call = stub(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for reply in call:
                yield part(reply)
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()  # does nothing to a call that has ended

    def _only(
        self, rpc: Rpc[Q, R], request: Q, timeout_s: float | None, part: Callable[[R], T]
    ) -> T:
        """The same of a stream that has one reply, read to its end: else it would be cancelled."""
        parts = list(self._stream(rpc, request, timeout_s, part))
        if not parts:
            raise no_answer()
        return parts[0]
