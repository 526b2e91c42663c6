"""The messages that a server answers with."""

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
    Usage,
)
from .pb.completions_pb2 import Completion, CompletionChoice
from .pb.generate_pb2 import (
    BestOfSequence,
    Details,
    FinishReason,
    GenerateResponse,
    GenerateStreamResponse,
    PrefillToken,
    StreamDetails,
    Token,
    TokenList,
)
from .pb.server_pb2 import InfoResponse
from .pb.tokenize_pb2 import SimpleToken

__all__ = [
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
    "InfoResponse",
    "PrefillToken",
    "SimpleToken",
    "StreamDetails",
    "Token",
    "TokenList",
    "ToolCall",
    "Usage",
]
