"""Requests that are refused, one a row: what is sent, and exactly what comes back.

REFUSED
    each row is sent as JSON through Envoy and as a typed message; both say the same.
REFUSED_JSON
    what no typed message can say, in the words of Envoy's JSON parser.
STRICT
    rows for a server with small limits, which `STRICT_FLAGS` start.
ACCEPTED, STRICT_ACCEPTED
    the last values that are still good.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

RPCS = {
    "/generate": "Generate",
    "/generate_stream": "GenerateStream",
    "/": "CompatGenerate",
    "/invocations": "Invocations",
    "/v1/chat/completions": "Chat",
    "/v1/completions": "Completions",
    "/tokenize": "Tokenize",
    "/chat_tokenize": "ChatTokenize",
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUIRED = {CHAT: "messages", "/chat_tokenize": "messages", COMPLETIONS: "prompt"}

# The limits of the bundled model with default settings; a test compares them with /info.
MAX_INPUT, MAX_TOTAL = 2047, 2048

SHAPE = "Failed to deserialize the JSON body into the target type: "
VALIDATION = "Input validation error: "

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SCHEMA = {"type": "json", "value": {"type": "object"}}


@dataclass(frozen=True, slots=True)
class Row:
    """A request that is refused.

    Args:
        path: where REST clients send it; it decides on the RPC.
        body: the JSON, which is also the typed message in protobuf's JSON form.
        error: the whole text.
        field: what `google.rpc.BadRequest` names.
        error_type: of REST, and the reason of `google.rpc.ErrorInfo`.
        in_band: whether REST clients hear of it inside a stream, with status 200.
    """

    path: str
    body: dict[str, Any]
    error: str
    field: str | None
    error_type: str = "validation"
    in_band: bool = False

    @property
    def rpc(self) -> str:
        """The method that the path is bound to."""
        return RPCS[self.path]

    @property
    def payload(self) -> str:
        """The error as JSON, byte for byte."""
        body = {"error": self.error, "error_type": self.error_type}
        return json.dumps(body, separators=(",", ":"))

    @property
    def content(self) -> str:
        """The whole body of a REST reply."""
        if not self.in_band:
            return self.payload
        end = "data: [DONE]\n\n" if "messages" in self.body or "prompt" in self.body else ""
        return f"data: {self.payload}\n\n{end}"


def check(reply: httpx.Response, status: int, error: str, error_type: str) -> None:
    """An error as a REST reply, and nothing of how it came about."""
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"error": error, "error_type": error_type}
    assert list(reply.json()) == ["error", "error_type"]
    internal = ("grpc-", "x-error", "x-http", "x-envoy")
    assert not [name for name in reply.headers if name.startswith(internal)]


def tokens(count: int) -> str:
    """A text of so many tokens, the beginning-of-text token included: no merge has this byte."""
    return "\x01" * (count - 1)


# Where parameters of /generate may stand, and what makes a stream of them.
_GENERATE_PATHS = ("/generate", "/generate_stream", "/", "/invocations")
_STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/generate_stream", {}),
    ("/", {"stream": True}),
    ("/invocations", {"stream": True}),
]

_TEMPERATURE = "`temperature` must be strictly positive"
_REPETITION = "`repetition_penalty` must be strictly positive"
_FREQUENCY = "`frequency_penalty` must be >= -2.0 and <= 2.0"
_TOP_P = "`top_p` must be > 0.0 and < 1.0"
_TYPICAL_P = "`typical_p` must be > 0.0 and < 1.0"
_TOP_K = "`top_k` must be strictly positive"
_MAX_NEW = "`max_new_tokens` must be strictly positive"
_SAMPLING = "you must use sampling when `best_of` is > 1"
_SEED = "`seed` must not be set when `best_of` > 1"
_EMPTY = "`inputs` cannot be empty"
_N = "`n` must be 1. Given: "
_SUFFIX = "Suffix is not supported and can be achieved by preprocessing the prompt."


def _best_of(given: int) -> str:
    return f"`best_of` must be > 0 and <= 2. Given: {given}"


def _stop(given: int) -> str:
    return f"`stop` supports up to 4 stop sequences. Given: {given}"


def _top_n(given: int) -> str:
    return f"`top_n_tokens` must be >= 0 and <= 5. Given: {given}"


def _truncate(given: int) -> str:
    return f"`truncate` must be strictly positive and less than {MAX_INPUT}. Given: {given}"


def _total(num_input: int, max_new: int, maximum: int = MAX_TOTAL) -> str:
    return (
        f"`inputs` tokens + `max_new_tokens` must be <= {maximum}. "
        f"Given: {num_input} `inputs` tokens and {max_new} `max_new_tokens`"
    )


# One parameter out of bounds, mostly just so: parameters, text, field. Numbers are float32: 1e-46
# is 0 and 0.99999999 is 1.
_PARAMETERS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 0}, _TEMPERATURE, "temperature"),
    ({"temperature": -0.0}, _TEMPERATURE, "temperature"),
    ({"temperature": 1e-46}, _TEMPERATURE, "temperature"),
    ({"temperature": -1e-45}, _TEMPERATURE, "temperature"),
    ({"temperature": -1}, _TEMPERATURE, "temperature"),
    ({"temperature": "NaN"}, _TEMPERATURE, "temperature"),
    ({"temperature": "Infinity"}, _TEMPERATURE, "temperature"),
    ({"temperature": "-Infinity"}, _TEMPERATURE, "temperature"),
    ({"repetition_penalty": 0}, _REPETITION, "repetition_penalty"),
    ({"repetition_penalty": -1.5}, _REPETITION, "repetition_penalty"),
    ({"repetition_penalty": "NaN"}, _REPETITION, "repetition_penalty"),
    ({"repetition_penalty": "Infinity"}, _REPETITION, "repetition_penalty"),
    ({"frequency_penalty": 2.0000003}, _FREQUENCY, "frequency_penalty"),
    ({"frequency_penalty": -2.0000003}, _FREQUENCY, "frequency_penalty"),
    ({"frequency_penalty": 1e38}, _FREQUENCY, "frequency_penalty"),
    ({"frequency_penalty": "NaN"}, _FREQUENCY, "frequency_penalty"),
    ({"frequency_penalty": "-Infinity"}, _FREQUENCY, "frequency_penalty"),
    ({"top_p": 0}, _TOP_P, "top_p"),
    ({"top_p": -0.5}, _TOP_P, "top_p"),
    ({"top_p": 0.99999999}, _TOP_P, "top_p"),
    ({"top_p": 1}, _TOP_P, "top_p"),
    ({"top_p": 1.0000002}, _TOP_P, "top_p"),
    ({"top_p": "NaN"}, _TOP_P, "top_p"),
    ({"typical_p": 0}, _TYPICAL_P, "typical_p"),
    ({"typical_p": -1}, _TYPICAL_P, "typical_p"),
    ({"typical_p": 1}, _TYPICAL_P, "typical_p"),
    ({"typical_p": 95}, _TYPICAL_P, "typical_p"),
    ({"typical_p": "NaN"}, _TYPICAL_P, "typical_p"),
    ({"top_k": 0}, _TOP_K, "top_k"),
    ({"top_k": -1}, _TOP_K, "top_k"),
    ({"top_k": -(2**31)}, _TOP_K, "top_k"),
    ({"max_new_tokens": 0}, _MAX_NEW, "max_new_tokens"),
    ({"stop": ["x"] * 5}, _stop(5), "stop"),
    ({"stop": [""] * 100}, _stop(100), "stop"),
    ({"top_n_tokens": 6}, _top_n(6), "top_n_tokens"),
    ({"top_n_tokens": 2**32 - 1}, _top_n(2**32 - 1), "top_n_tokens"),
    ({"truncate": 0}, _truncate(0), "truncate"),
    ({"truncate": MAX_INPUT + 1}, _truncate(MAX_INPUT + 1), "truncate"),
    ({"truncate": 2**32 - 1}, _truncate(2**32 - 1), "truncate"),
    ({"max_new_tokens": MAX_TOTAL - 1}, _total(2, MAX_TOTAL - 1), "max_new_tokens"),
    ({"max_new_tokens": 2**32 - 1}, _total(2, 2**32 - 1), "max_new_tokens"),
    ({"truncate": 1, "max_new_tokens": MAX_TOTAL}, _total(1, MAX_TOTAL), "max_new_tokens"),
]

# What only requests without a stream are told.
_BEST_OF: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 3, "do_sample": True}, _best_of(3), "best_of"),
    ({"best_of": 3}, _best_of(3), "best_of"),
    ({"best_of": 2**32 - 1, "top_k": 0}, _best_of(2**32 - 1), "best_of"),
    ({"best_of": 2}, _SAMPLING, "best_of"),
    ({"best_of": 2, "seed": 1}, _SAMPLING, "best_of"),
    ({"best_of": 2, "do_sample": True, "seed": 0}, _SEED, "seed"),
    ({"best_of": 2, "temperature": 1.0, "seed": 1}, _SEED, "seed"),
    ({"best_of": 2, "typical_p": 0.5, "seed": 2**64 - 1}, _SEED, "seed"),
]

# The same for streams: before everything else.
_NO_BEST_OF = "`best_of` != 1 is not supported when streaming tokens"
_NO_PREFILL = "`decoder_input_details` == true is not supported when streaming tokens"
_IN_STREAMS: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 0}, _NO_BEST_OF, "best_of"),
    ({"best_of": 2, "do_sample": True}, _NO_BEST_OF, "best_of"),
    ({"best_of": 3, "decoder_input_details": True, "temperature": 0}, _NO_BEST_OF, "best_of"),
    ({"decoder_input_details": True}, _NO_PREFILL, "decoder_input_details"),
    ({"decoder_input_details": True, "top_k": 0}, _NO_PREFILL, "decoder_input_details"),
]

# All rules of one generation in TGI's order, each broken once. They do not exclude each other, so a
# request that breaks all from some point on must hear of the first.
_ORDER: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 3}, _best_of(3), "best_of"),
    ({"temperature": 0, "best_of": 2}, _TEMPERATURE, "temperature"),
    ({"repetition_penalty": 0}, _REPETITION, "repetition_penalty"),
    ({"frequency_penalty": 3}, _FREQUENCY, "frequency_penalty"),
    ({"top_p": 1}, _TOP_P, "top_p"),
    ({"typical_p": 1}, _TYPICAL_P, "typical_p"),
    ({"top_k": 0}, _TOP_K, "top_k"),
    ({"max_new_tokens": 0}, _MAX_NEW, "max_new_tokens"),
    ({"stop": ["x"] * 5}, _stop(5), "stop"),
    ({"seed": 1, "best_of": 2, "do_sample": True}, _SEED, "seed"),
    ({"top_n_tokens": 6}, _top_n(6), "top_n_tokens"),
    ({"inputs": ""}, _EMPTY, "inputs"),
    ({"truncate": 0}, _truncate(0), "truncate"),
    ({"max_new_tokens": MAX_TOTAL}, _total(2, MAX_TOTAL), "max_new_tokens"),
]


def _generate(path: str, parameters: dict[str, Any], error: str, field: str, **more: Any) -> Row:
    body = {"inputs": "a", "parameters": parameters, **more}
    in_band = path == "/generate_stream" or body.get("stream", False)
    return Row(path, body, VALIDATION + error, f"parameters.{field}", in_band=in_band)


def _ordered(index: int) -> Row:
    """The rule at an index and all behind it, broken at once."""
    parameters: dict[str, Any] = {}
    for broken, _, _ in reversed(_ORDER[index:]):
        parameters |= broken
    inputs = parameters.pop("inputs", "a")
    _, error, field = _ORDER[index]
    path = field if field == "inputs" else f"parameters.{field}"
    return Row("/generate", {"inputs": inputs, "parameters": parameters}, VALIDATION + error, path)


def _missing(path: str) -> list[Row]:
    """The required field: not there, and null."""
    name = REQUIRED.get(path, "inputs")
    error = f"{SHAPE}missing field `{name}`"
    return [Row(path, {}, error, name), Row(path, {name: None}, error, name)]


_GENERATE_ROWS = [
    *(_generate(path, *row) for row in _PARAMETERS for path in _GENERATE_PATHS),
    *(
        _generate(path, *row, stream=True)
        for row in _PARAMETERS[:3]
        for path in _GENERATE_PATHS[2:]
    ),
    *(_generate(path, *row) for row in _BEST_OF for path in ("/generate", "/", "/invocations")),
    *(_generate(path, *row, **more) for row in _IN_STREAMS for path, more in _STREAMS),
    *(_ordered(index) for index in range(len(_ORDER))),
    *(
        Row(path, {"inputs": "", **more}, VALIDATION + _EMPTY, "inputs", in_band=True)
        for path, more in _STREAMS
    ),
    *(
        Row(path, {"inputs": ""}, VALIDATION + _EMPTY, "inputs")
        for path in ("/generate", "/", "/invocations")
    ),
    # Nothing of it is looked at without the text.
    Row(
        "/generate",
        {"parameters": {"temperature": 0, "best_of": 3}},
        f"{SHAPE}missing field `inputs`",
        "inputs",
    ),
]

_UNTAGGED = "data did not match any variant of untagged enum MessageContent"
_IMAGE = VALIDATION + "the model takes text only; `image_url` is not supported"
_IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
_TEXT_PART = {"type": "text", "text": "hi"}


def _chat(error: str, field: str | None, error_type: str = "validation", **changes: Any) -> Row:
    body = {"messages": MESSAGES, "max_tokens": 2, **changes}
    return Row(CHAT, body, error, field, error_type)


def _content(content: Any, error: str = f"{SHAPE}messages[0].content: {_UNTAGGED}") -> Row:
    messages = [{"role": "user", "content": content}]
    return _chat(error, "messages[0].content", messages=messages)


# What chat calls parameters of /generate.
CHAT_FIELDS = {
    "max_new_tokens": "max_tokens",
    "repetition_penalty": "presence_penalty",
    "top_n_tokens": "top_logprobs",
}


def _chat_parameter(error: str, field: str, **changes: Any) -> list[Row]:
    """A rule of one generation: a status, and in a stream an event."""
    row = _chat(VALIDATION + error, CHAT_FIELDS.get(field, field), **changes)
    return [row, Row(CHAT, {**row.body, "stream": True}, row.error, row.field, in_band=True)]


def _role(role: str, text: str, path: str = CHAT) -> Row:
    messages = [*MESSAGES, {"role": role, "content": "x"}]
    error = f"Template error: syntax error: {text}"
    return Row(path, {"messages": messages}, error, None, "template_error")


_CHAT_ROWS = [
    _chat(f"{SHAPE}missing field `messages`", "messages", messages=[]),
    _chat(f"{SHAPE}missing field `messages`", "messages", messages=[], n=2, stream=True),
    # Messages of a wrong shape: the first one counts.
    _chat(f"{SHAPE}missing field `messages[0].role`", "messages[0].role", messages=[{}]),
    _chat(
        f"{SHAPE}missing field `messages[0].role`",
        "messages[0].role",
        messages=[{"role": None, "content": 5}, {}],
    ),
    _chat(
        f"{SHAPE}missing field `messages[1].content`",
        "messages[1].content",
        messages=[*MESSAGES, {"role": "user"}],
    ),
    _chat(
        f"{SHAPE}missing field `messages[1].content`",
        "messages[1].content",
        messages=[*MESSAGES, {"role": "assistant", "content": None, "tool_calls": []}],
    ),
    _content(None, f"{SHAPE}missing field `messages[0].content`"),
    _content(5),
    _content(0.5),
    _content(True),
    _content({}),
    _content(_TEXT_PART),
    _content([5]),
    _content([None]),
    _content(["hi"]),
    _content([[_TEXT_PART]]),
    _content([{}]),
    _content([{"text": "hi"}]),
    _content([{"type": "text"}]),
    _content([{"type": "text", "text": 5}]),
    _content([{"type": "text", "text": None}]),
    _content([_TEXT_PART, {"type": "input_audio", "input_audio": {}}]),
    _content([_IMAGE_PART], _IMAGE),
    _content([_TEXT_PART, _IMAGE_PART, 5], _IMAGE),
    # What the server does not do.
    _chat(f"{VALIDATION}{_N}0", "n", n=0),
    _chat(f"{VALIDATION}{_N}2", "n", n=2),
    _chat(f"{VALIDATION}{_N}{2**32 - 1}", "n", n=2**32 - 1),
    _chat(f"{VALIDATION}{_N}2", "n", n=2, stream=True),
    # Two faults: shape, `n`, format with tools, template, and only then the rules.
    _chat(f"{VALIDATION}{_N}2", "n", n=2, response_format=SCHEMA, tools=TOOLS),
    _chat(f"{VALIDATION}{_N}2", "n", n=2, messages=[{"role": "weird", "content": 5}]),
    _chat(
        "Grammar and tools are mutually exclusive",
        None,
        "grammar and tools",
        response_format=SCHEMA,
        tools=TOOLS,
    ),
    _chat(
        "Grammar and tools are mutually exclusive",
        None,
        "grammar and tools",
        response_format={"type": "json_object"},
        tools=TOOLS,
        tool_choice="none",
        temperature=-1,
    ),
    _role("weird", "Unknown message role: weird"),
    _role("", "Unknown message role: "),
    _role("User", "Unknown message role: User"),
    _role('a "b"\n\u00fc\U0001f642', 'Unknown message role: a "b"\n\u00fc\U0001f642'),
    _chat(
        "Template error: syntax error: Unknown message role: weird",
        None,
        "template_error",
        messages=[{"role": "weird", "content": "x"}],
        temperature=-1,
        stream=True,
    ),
    # Tools that cannot be called.
    _chat(
        "Tool error: Tool with name g not found",
        "tool_choice",
        "tool_error",
        tools=TOOLS,
        tool_choice="g",
    ),
    _chat(
        "Tool error: Tool with name g not found",
        "tool_choice",
        "tool_error",
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "g"}},
        temperature=-1,
        stream=True,
    ),
    # The rules of one generation, in /generate's words.
    *_chat_parameter(_TEMPERATURE, "temperature", temperature=-1e-45),
    *_chat_parameter(_TEMPERATURE, "temperature", temperature="NaN"),
    *_chat_parameter(_REPETITION, "repetition_penalty", presence_penalty=-2),
    *_chat_parameter(_REPETITION, "repetition_penalty", presence_penalty="NaN"),
    *_chat_parameter(_FREQUENCY, "frequency_penalty", frequency_penalty=-2.0000003),
    *_chat_parameter(_TOP_P, "top_p", top_p=1, max_tokens=0),
    *_chat_parameter(_MAX_NEW, "max_new_tokens", max_tokens=0),
    *_chat_parameter(_MAX_NEW, "max_new_tokens", max_completion_tokens=0),
    *_chat_parameter(_stop(5), "stop", stop=["x"] * 5),
    *_chat_parameter(_top_n(6), "top_n_tokens", logprobs=True, top_logprobs=6),
    *_chat_parameter(_total(5, MAX_TOTAL), "max_new_tokens", max_tokens=MAX_TOTAL),
    # The other path that makes a prompt of messages.
    Row(
        "/chat_tokenize",
        {"messages": [{"role": "user", "content": [5]}]},
        f"{SHAPE}messages[0].content: {_UNTAGGED}",
        "messages[0].content",
    ),
    Row("/chat_tokenize", {"messages": MESSAGES, "n": 2}, f"{VALIDATION}{_N}2", "n"),
    _role("weird", "Unknown message role: weird", "/chat_tokenize"),
]


def _completion(error: str, field: str, error_type: str = "validation", **changes: Any) -> Row:
    body = {"prompt": ["a"], "max_tokens": 2, **changes}
    return Row(COMPLETIONS, body, error, field, error_type)


def _completion_parameter(error: str, field: str, **changes: Any) -> list[Row]:
    row = _completion(VALIDATION + error, field, **changes)
    body = {**row.body, "stream": True}
    return [row, Row(COMPLETIONS, body, row.error, row.field, in_band=True)]


_BATCH_SIZE = "Number of prompts exceeds the maximum allowed batch size of 4"

_COMPLETION_ROWS = [
    _completion(f"{SHAPE}missing field `prompt`", "prompt", prompt=[]),
    _completion(_SUFFIX, "suffix", "suffix not supported", suffix="x"),
    _completion(_SUFFIX, "suffix", "suffix not supported", suffix="", stream=True),
    _completion(_BATCH_SIZE, "prompt", "batch size exceeded", prompt=["a"] * 5),
    _completion(_BATCH_SIZE, "prompt", "batch size exceeded", prompt=["a"] * 100, stream=True),
    # Two faults: the suffix, the prompts, the rules.
    _completion(_SUFFIX, "suffix", "suffix not supported", suffix="", prompt=[]),
    _completion(_SUFFIX, "suffix", "suffix not supported", suffix="x", prompt=[""] * 5),
    _completion(_BATCH_SIZE, "prompt", "batch size exceeded", prompt=[""] * 5, max_tokens=0),
    _completion(VALIDATION + _MAX_NEW, "max_tokens", prompt=["", ""], max_tokens=0),
    _completion(VALIDATION + _EMPTY, "prompt", prompt=["a", "", "a"]),
    *_completion_parameter(_EMPTY, "prompt", prompt=[""]),
    *_completion_parameter(_TEMPERATURE, "temperature", temperature=-0.5),
    *_completion_parameter(_REPETITION, "repetition_penalty", repetition_penalty=0),
    *_completion_parameter(_FREQUENCY, "frequency_penalty", frequency_penalty=2.5),
    *_completion_parameter(_TOP_P, "top_p", top_p=1.0),
    *_completion_parameter(_MAX_NEW, "max_tokens", max_tokens=0),
    *_completion_parameter(_stop(6), "stop", stop=["x"] * 6),
    *_completion_parameter(_total(2, MAX_TOTAL - 1), "max_tokens", max_tokens=MAX_TOTAL - 1),
]


def _ambiguous(given: str, **body: Any) -> Row:
    error = f"{VALIDATION}one of `inputs`, `messages` and `prompt` must be set. Given: {given}"
    return Row("/invocations", body, error, None)


_INVOCATION_ROWS = [
    Row("/invocations", {"stream": True}, f"{SHAPE}missing field `inputs`", "inputs"),
    Row("/invocations", {"messages": []}, f"{SHAPE}missing field `inputs`", "inputs"),
    Row("/invocations", {"prompt": []}, f"{SHAPE}missing field `inputs`", "inputs"),
    _ambiguous("`inputs` and `messages`", inputs="a", messages=MESSAGES),
    _ambiguous("`inputs` and `prompt`", inputs="", prompt=["a"], stream=True),
    _ambiguous("`messages` and `prompt`", messages=[{}], prompt=["a"], suffix=""),
    _ambiguous("`inputs` and `messages` and `prompt`", inputs="a", messages=MESSAGES, prompt=["a"]),
    # What the endpoint that was meant says.
    *(
        Row("/invocations", row.body, row.error, row.field, row.error_type, row.in_band)
        for row in (*_CHAT_ROWS, *_COMPLETION_ROWS)
        if row.path in (CHAT, COMPLETIONS) and (row.body.get("messages") or row.body.get("prompt"))
    ),
]

REFUSED = [
    *(row for path in RPCS for row in _missing(path)),
    *_GENERATE_ROWS,
    *_CHAT_ROWS,
    *_COMPLETION_ROWS,
    *_INVOCATION_ROWS,
]


def _parameter(text: str) -> str:
    return f'{{"inputs": "a", "parameters": {{{text}}}}}'


def _wrong(name: str, value: str, kind: str) -> tuple[str, str]:
    """A parameter of a wrong type: the body, and what the parser says."""
    return _parameter(
        f'"{name}": {value}'
    ), f"parameters.{name}: invalid value {value} for type {kind}"


_NO_LIST = "Proto field is not repeating, cannot start list."
_NO_OBJECT = "invalid value Starting an object on a scalar field for type"
_MESSAGE = "type.googleapis.com/tokenwire.v1"

# Bodies of /generate and /invocations: text, and the error behind SHAPE.
_GENERATE_JSON: list[tuple[str, str]] = [
    ("null", ": Root element must be a message."),
    ("[]", ": Root element must be a message."),
    ('"inputs"', ": Root element must be a message."),
    ("1", ": Root element must be a message."),
    ("not json", "Unexpected token.\nnot json\n^"),
    ("{", "Unexpected end of string. Expected an object key or }.\n\n^"),
    ('{"inputs": }', "Unexpected token.\n}\n^"),
    (
        '{"inputs": "a" "b"}',
        'Expected , or } after key:value pair.\n{"inputs": "a" "b"}\n               ^',
    ),
    (
        '{"inputs": "a"} {}',
        'Parsing terminated before end of input.\n{"inputs": "a"} {}\n                ^',
    ),
    ('{"inputs": "\\ud800"}', 'Missing low surrogate.\n\\ud800"}\n^'),
    (
        '{"inputs": "a", "inputs": "a"}',
        ": invalid value oneof field '_inputs' is already set. Cannot set 'inputs' for type oneof",
    ),
    ('{"inputs": 1}', "inputs: invalid value 1 for type TYPE_STRING"),
    ('{"inputs": true}', "inputs: invalid value true for type TYPE_STRING"),
    ('{"inputs": ["a"]}', f": {_NO_LIST}"),
    ('{"inputs": {}}', f": {_NO_OBJECT} inputs"),
    (
        '{"inputs": "a", "parameters": "x"}',
        f'parameters: invalid value "x" for type {_MESSAGE}.GenerateParameters',
    ),
    ('{"inputs": "a", "parameters": []}', f": {_NO_LIST}"),
    _wrong("best_of", "-1", "TYPE_UINT32"),
    _wrong("temperature", '"hot"', "TYPE_FLOAT"),
    _wrong("temperature", "true", "TYPE_FLOAT"),
    (_parameter('"temperature": []'), f"parameters: {_NO_LIST}"),
    (_parameter('"temperature": {}'), f"parameters: {_NO_OBJECT} temperature"),
    (
        _parameter('"temperature": NaN'),
        'Unexpected token.\ns": {"temperature": NaN}}\n                    ^',
    ),
    _wrong("top_k", "1.5", "TYPE_INT32"),
    _wrong("top_k", "2147483648", "TYPE_INT32"),
    _wrong("top_k", "-2147483649", "TYPE_INT32"),
    _wrong("do_sample", "1", "TYPE_BOOL"),
    _wrong("max_new_tokens", "-1", "TYPE_UINT32"),
    _wrong("max_new_tokens", "1.5", "TYPE_UINT32"),
    _wrong("max_new_tokens", '"many"', "TYPE_UINT32"),
    _wrong("max_new_tokens", "4294967296", "TYPE_UINT32"),
    _wrong("truncate", "-1", "TYPE_UINT32"),
    _wrong("seed", "-1", "TYPE_UINT64"),
    (
        _parameter('"seed": 18446744073709551616'),
        "parameters.seed: invalid value 1.8446744073709552e+19 for type TYPE_UINT64",
    ),
    (_parameter('"stop": [1]'), "parameters.stop[0]: invalid value 1 for type TYPE_STRING"),
    _wrong("details", '"yes, please"', "TYPE_BOOL"),
    (
        _parameter('"grammar": {"type": "xml", "value": "a"}'),
        f'parameters.grammar.type: invalid value "xml" for type {_MESSAGE}.Grammar.Type',
    ),
    (
        _parameter('"max_new_tokens": 1, "maxNewTokens": 1'),
        "parameters: invalid value oneof field '_max_new_tokens' is already set. "
        "Cannot set 'maxNewTokens' for type oneof",
    ),
]

# Path, text, and the error behind SHAPE.
REFUSED_JSON: list[tuple[str, str, str]] = [
    *((path, *row) for row in _GENERATE_JSON for path in ("/generate", "/invocations")),
    ("/", '{"inputs": "a", "stream": 1}', "stream: invalid value 1 for type TYPE_BOOL"),
    ("/tokenize", '{"inputs": 1}', "inputs: invalid value 1 for type TYPE_STRING"),
    ("/tokenize", '{"inputs": ["a"]}', f": {_NO_LIST}"),
    *(
        (path, text, error)
        for path in (CHAT, "/chat_tokenize", "/invocations")
        for text, error in [
            ('{"messages": "hi"}', f'messages: invalid value "hi" for type {_MESSAGE}.Message'),
            (
                '{"messages": ["hi"]}',
                f'messages[0]: invalid value "hi" for type {_MESSAGE}.Message',
            ),
            (
                '{"messages": [{"role": 5, "content": "x"}]}',
                "messages[0].role: invalid value 5 for type TYPE_STRING",
            ),
            ('{"n": -1}', "n: invalid value -1 for type TYPE_UINT32"),
            ('{"n": "two"}', 'n: invalid value "two" for type TYPE_UINT32'),
            ('{"model": 5}', "model: invalid value 5 for type TYPE_STRING"),
            ('{"logit_bias": {"50256": -100}}', f": {_NO_OBJECT} logit_bias"),
            ('{"logprobs": 1}', "logprobs: invalid value 1 for type TYPE_BOOL"),
            ('{"stop": [1]}', "stop[0]: invalid value 1 for type TYPE_STRING"),
            ('{"seed": -1}', "seed: invalid value -1 for type TYPE_UINT64"),
            ('{"tools": "f"}', f'tools: invalid value "f" for type {_MESSAGE}.Tool'),
            (
                '{"response_format": {"type": "xml"}}',
                f'response_format.type: invalid value "xml" for type {_MESSAGE}.ResponseFormatType',
            ),
            (
                '{"stream_options": 5}',
                f"stream_options: invalid value 5 for type {_MESSAGE}.StreamOptions",
            ),
            (
                '{"stream_options": {"include_usage": "x"}}',
                'stream_options.include_usage: invalid value "x" for type TYPE_BOOL',
            ),
        ]
    ),
    *(
        (path, text, error)
        for path in (COMPLETIONS, "/invocations")
        for text, error in [
            ('{"prompt": 1}', "prompt: invalid value 1 for type TYPE_STRING"),
            ('{"prompt": {}}', f": {_NO_OBJECT} prompt"),
            ('{"prompt": [1]}', "prompt[0]: invalid value 1 for type TYPE_STRING"),
            ('{"suffix": 1}', "suffix: invalid value 1 for type TYPE_STRING"),
            ('{"max_tokens": "x"}', 'max_tokens: invalid value "x" for type TYPE_UINT32'),
            ('{"stream": "x"}', 'stream: invalid value "x" for type TYPE_BOOL'),
        ]
    ),
]

STRICT_FLAGS = (
    "--max-best-of=1",
    "--max-input-tokens=8",
    "--max-total-tokens=32",
    "--max-stop-sequences=0",
    "--max-top-n-tokens=0",
    "--max-client-batch-size=1",
    "--max-request-bytes=1000",
)


def _strict(error: str, field: str, inputs: str = "a", **parameters: Any) -> Row:
    path = field if field == "inputs" else f"parameters.{field}"
    return Row("/generate", {"inputs": inputs, "parameters": parameters}, VALIDATION + error, path)


_LONG = "`inputs` must have less than 8 tokens. Given: "

STRICT = [
    _strict("`best_of` != 1 is not allowed for this endpoint", "best_of", best_of=2, top_k=0),
    _strict(
        "`stop` supports up to 0 stop sequences. Given: 1", "stop", stop=["x"], max_new_tokens=1
    ),
    _strict("`top_n_tokens` must be >= 0 and <= 0. Given: 1", "top_n_tokens", top_n_tokens=1),
    _strict(
        "`truncate` must be strictly positive and less than 8. Given: 9", "truncate", truncate=9
    ),
    _strict(_total(2, 100, 32), "max_new_tokens"),  # the default
    _strict(_total(2, 31, 32), "max_new_tokens", max_new_tokens=31),
    _strict(_total(8, 25, 32), "max_new_tokens", tokens(8), max_new_tokens=25),
    _strict(_total(8, 25, 32), "max_new_tokens", tokens(20), truncate=8, max_new_tokens=25),
    _strict(_total(9, 24, 32), "max_new_tokens", tokens(9), max_new_tokens=24),
    _strict(_total(33, 1, 32), "max_new_tokens", tokens(33), max_new_tokens=1),
    _strict(_LONG + "9", "inputs", tokens(9), max_new_tokens=23),
    _strict(_LONG + "31", "inputs", tokens(31), max_new_tokens=1),
    Row(
        COMPLETIONS,
        {"prompt": ["a", "a"]},
        "Number of prompts exceeds the maximum allowed batch size of 1",
        "prompt",
        "batch size exceeded",
    ),
    Row(
        COMPLETIONS,
        {"prompt": [tokens(9)], "max_tokens": 1, "stream": True},
        f"{VALIDATION}{_LONG}9",
        "prompt",
        in_band=True,
    ),
    Row(
        CHAT,
        {"messages": [{"role": "user", "content": tokens(7)}], "max_tokens": 1},
        f"{VALIDATION}{_LONG}10",
        "messages",
    ),
]

STRICT_ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a", "parameters": {"best_of": 1, "max_new_tokens": 30}}),
    ("/generate", {"inputs": tokens(8), "parameters": {"max_new_tokens": 24}}),
    ("/generate", {"inputs": tokens(20), "parameters": {"max_new_tokens": 24, "truncate": 8}}),
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1, "top_n_tokens": 0}}),
    (COMPLETIONS, {"prompt": [tokens(8)], "max_tokens": 24}),
]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    *(
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1, **parameters}})
        for parameters in [
            {"temperature": 1e-30},
            {"temperature": 3.4e38},
            {"repetition_penalty": 1e-30},
            {"repetition_penalty": 3.4e38},
            {"frequency_penalty": 2},
            {"frequency_penalty": 2.0000001},
            {"frequency_penalty": -2},
            {"top_p": 1e-45},
            {"top_p": 0.9999999},
            {"typical_p": 1e-45},
            {"typical_p": 0.9999999},
            {"top_k": 1},
            {"top_k": 2**31 - 1},
            {"max_new_tokens": 1},
            {"stop": ["x"] * 4},
            {"seed": 0},
            {"seed": 2**64 - 1},
            {"seed": 1, "best_of": 1},
            {"top_n_tokens": 0},
            {"top_n_tokens": 5},
            {"truncate": 1},
            {"truncate": MAX_INPUT},
            {"best_of": 0},
            {"best_of": 2, "do_sample": True},
            {"best_of": 2, "temperature": 1.0},
            {"best_of": 2, "top_k": 1},
        ]
    ),
    ("/generate_stream", {"inputs": "a", "parameters": {"best_of": 1, "max_new_tokens": 1}}),
    ("/generate", {"inputs": tokens(MAX_INPUT), "parameters": {"max_new_tokens": 1}}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "n": 1}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "temperature": 0}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "presence_penalty": -1.9999999}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "tools": [], "response_format": None}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "tools": TOOLS, "tool_choice": "none"}),
    (CHAT, {"messages": [{"role": "user", "content": ""}], "max_tokens": 1}),
    (CHAT, {"messages": [{"role": "user", "content": []}], "max_tokens": 1}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0, "max_completion_tokens": 1}),
    (COMPLETIONS, {"prompt": ["a"] * 4, "max_tokens": 1}),
    (COMPLETIONS, {"prompt": ["a"], "max_tokens": 1, "suffix": None}),
    ("/tokenize", {"inputs": ""}),
    ("/chat_tokenize", {"messages": MESSAGES, "temperature": -1}),
    ("/invocations", {"inputs": "a", "messages": [], "prompt": [], "parameters": {"seed": 0}}),
]
