"""The methods of the service that the clients call, with the types of their messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from .pb import adapters_pb2, chat_pb2, completions_pb2, generate_pb2, server_pb2, tokenize_pb2

SERVICE = "tokenwire.v1.TextGenerationService"

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Rpc(Generic[Q, R]):
    """A method: its name, its request and its reply, or each reply of its stream."""

    name: str
    request: type[Q]
    reply: type[R]

    @property
    def path(self) -> str:
        """As HTTP/2 has it."""
        return f"/{SERVICE}/{self.name}"


GENERATE = Rpc("Generate", generate_pb2.GenerateRequest, generate_pb2.GenerateResponse)
GENERATE_STREAM = Rpc(
    "GenerateStream", generate_pb2.GenerateRequest, generate_pb2.GenerateStreamResponse
)
CHAT = Rpc("Chat", chat_pb2.ChatRequest, chat_pb2.ChatResponse)
COMPLETIONS = Rpc(
    "Completions", completions_pb2.CompletionsRequest, completions_pb2.CompletionsResponse
)
TOKENIZE = Rpc("Tokenize", tokenize_pb2.TokenizeRequest, tokenize_pb2.TokenizeResponse)
INFO = Rpc("Info", server_pb2.InfoRequest, server_pb2.InfoResponse)
GET_LOAD = Rpc("GetLoad", server_pb2.GetLoadRequest, server_pb2.GetLoadResponse)
WATCH_LOAD = Rpc("WatchLoad", server_pb2.WatchLoadRequest, server_pb2.GetLoadResponse)
ABORT = Rpc("Abort", server_pb2.AbortRequest, server_pb2.AbortResponse)
LOAD_ADAPTER = Rpc("LoadAdapter", adapters_pb2.LoadAdapterRequest, adapters_pb2.LoadAdapterResponse)
UNLOAD_ADAPTER = Rpc(
    "UnloadAdapter", adapters_pb2.UnloadAdapterRequest, adapters_pb2.UnloadAdapterResponse
)
LIST_ADAPTERS = Rpc(
    "ListAdapters", adapters_pb2.ListAdaptersRequest, adapters_pb2.ListAdaptersResponse
)
HEALTH = Rpc("Health", server_pb2.HealthRequest, server_pb2.HealthResponse)
