"""The messages that a server answers with."""

from .pb.adapters_pb2 import Adapter
from .pb.chat_pb2 import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprob,
    ChatLogprobs,
    ChatTopLogprob,
    FunctionCall,
    ToolCall,
)
from .pb.completions_pb2 import Completion, CompletionChoice
from .pb.generate_pb2 import (
    BestOfSequence,
    Details,
    FinishReason,
    GenerateResponse,
    GenerateStreamResponse,
    PrefillToken,
    StopMatch,
    StreamDetails,
    Token,
    TokenList,
    Usage,
)
from .pb.server_pb2 import GetLoadResponse, InfoResponse
from .pb.tokenize_pb2 import SimpleToken

__all__ = [
    "Adapter",
    "AssistantMessage",
    "BestOfSequence",
    "ChatChoice",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatLogprob",
    "ChatLogprobs",
    "ChatTopLogprob",
    "Completion",
    "CompletionChoice",
    "Details",
    "FinishReason",
    "FunctionCall",
    "GenerateResponse",
    "GenerateStreamResponse",
    "GetLoadResponse",
    "InfoResponse",
    "PrefillToken",
    "SimpleToken",
    "StopMatch",
    "StreamDetails",
    "Token",
    "TokenList",
    "ToolCall",
    "Usage",
]
