from google.api import httpbody_pb2 as _httpbody_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from . import chat_pb2 as _chat_pb2
from . import completions_pb2 as _completions_pb2
from . import generate_pb2 as _generate_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InvocationsRequest(_message.Message):
    __slots__ = ("inputs", "parameters", "messages", "prompt", "stream", "model", "frequency_penalty", "logprobs", "top_logprobs", "max_tokens", "n", "presence_penalty", "stop", "seed", "temperature", "top_p", "tools", "tool_prompt", "tool_choice", "response_format", "max_completion_tokens", "stream_options", "suffix", "repetition_penalty", "min_p", "min_tokens", "ignore_eos", "stop_token_ids", "logit_bias", "priority", "request_id", "input_ids", "prompt_ids", "echo", "chat_template_kwargs", "reasoning_effort", "documents", "add_generation_prompt", "continue_final_message", "parallel_tool_calls", "escape_special_tokens", "images", "http")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    TOOL_PROMPT_FIELD_NUMBER: _ClassVar[int]
    TOOL_CHOICE_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MAX_COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STREAM_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_KWARGS_FIELD_NUMBER: _ClassVar[int]
    REASONING_EFFORT_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    ESCAPE_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    inputs: str
    parameters: _generate_pb2.GenerateParameters
    messages: _containers.RepeatedCompositeFieldContainer[_chat_pb2.Message]
    prompt: _containers.RepeatedScalarFieldContainer[str]
    stream: bool
    model: str
    frequency_penalty: float
    logprobs: bool
    top_logprobs: int
    max_tokens: int
    n: int
    presence_penalty: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    seed: int
    temperature: float
    top_p: float
    tools: _containers.RepeatedCompositeFieldContainer[_chat_pb2.Tool]
    tool_prompt: str
    tool_choice: _struct_pb2.Value
    response_format: _chat_pb2.ResponseFormat
    max_completion_tokens: int
    stream_options: _chat_pb2.StreamOptions
    suffix: str
    repetition_penalty: float
    min_p: float
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias: _containers.ScalarMap[int, float]
    priority: int
    request_id: str
    input_ids: _generate_pb2.TokenIds
    prompt_ids: _containers.RepeatedCompositeFieldContainer[_generate_pb2.TokenIds]
    echo: bool
    chat_template_kwargs: _struct_pb2.Struct
    reasoning_effort: str
    documents: _containers.RepeatedCompositeFieldContainer[_struct_pb2.Struct]
    add_generation_prompt: bool
    continue_final_message: bool
    parallel_tool_calls: bool
    escape_special_tokens: bool
    images: _containers.RepeatedCompositeFieldContainer[_generate_pb2.Image]
    http: _httpbody_pb2.HttpBody
    def __init__(self, inputs: _Optional[str] = ..., parameters: _Optional[_Union[_generate_pb2.GenerateParameters, _Mapping]] = ..., messages: _Optional[_Iterable[_Union[_chat_pb2.Message, _Mapping]]] = ..., prompt: _Optional[_Iterable[str]] = ..., stream: _Optional[bool] = ..., model: _Optional[str] = ..., frequency_penalty: _Optional[float] = ..., logprobs: _Optional[bool] = ..., top_logprobs: _Optional[int] = ..., max_tokens: _Optional[int] = ..., n: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., seed: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., tools: _Optional[_Iterable[_Union[_chat_pb2.Tool, _Mapping]]] = ..., tool_prompt: _Optional[str] = ..., tool_choice: _Optional[_Union[_struct_pb2.Value, _Mapping]] = ..., response_format: _Optional[_Union[_chat_pb2.ResponseFormat, _Mapping]] = ..., max_completion_tokens: _Optional[int] = ..., stream_options: _Optional[_Union[_chat_pb2.StreamOptions, _Mapping]] = ..., suffix: _Optional[str] = ..., repetition_penalty: _Optional[float] = ..., min_p: _Optional[float] = ..., min_tokens: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., priority: _Optional[int] = ..., request_id: _Optional[str] = ..., input_ids: _Optional[_Union[_generate_pb2.TokenIds, _Mapping]] = ..., prompt_ids: _Optional[_Iterable[_Union[_generate_pb2.TokenIds, _Mapping]]] = ..., echo: _Optional[bool] = ..., chat_template_kwargs: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., reasoning_effort: _Optional[str] = ..., documents: _Optional[_Iterable[_Union[_struct_pb2.Struct, _Mapping]]] = ..., add_generation_prompt: _Optional[bool] = ..., continue_final_message: _Optional[bool] = ..., parallel_tool_calls: _Optional[bool] = ..., escape_special_tokens: _Optional[bool] = ..., images: _Optional[_Iterable[_Union[_generate_pb2.Image, _Mapping]]] = ..., http: _Optional[_Union[_httpbody_pb2.HttpBody, _Mapping]] = ...) -> None: ...

class InvocationsResponse(_message.Message):
    __slots__ = ("generate", "chat", "completions", "http")
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    generate: _generate_pb2.CompatGenerateResponse
    chat: _chat_pb2.ChatResponse
    completions: _completions_pb2.CompletionsResponse
    http: _httpbody_pb2.HttpBody
    def __init__(self, generate: _Optional[_Union[_generate_pb2.CompatGenerateResponse, _Mapping]] = ..., chat: _Optional[_Union[_chat_pb2.ChatResponse, _Mapping]] = ..., completions: _Optional[_Union[_completions_pb2.CompletionsResponse, _Mapping]] = ..., http: _Optional[_Union[_httpbody_pb2.HttpBody, _Mapping]] = ...) -> None: ...
