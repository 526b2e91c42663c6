"""Bodies of REST requests that no typed message can hold, with the exact answer.

A body that is no JSON is a 400, also if it has wrong types; one that is no request is a 422, with
the first wrong type in the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.e2e.error_texts import JSON, NO_PROMPT, SHAPE
from tests.e2e.refusal import CHAT, COMPLETIONS, RPCS

_MESSAGES = '"messages": [{"role": "user", "content": "hi"}]'
_TURN = '{"role": "user", "content": "hi"}'
_TOO_DEEP = "it is nested more than 128 deep"
_TOO_LARGE = "number out of range"
_KEY = "object keys must be strings (byte {})"
_CHARACTER = "invalid character (byte {})"
_CUT = "Input data was truncated"
_UTF8 = "invalid UTF-8 (byte {})"
_HALF = "half a surrogate pair (byte {})"
_LONG = "1" + "0" * 5000  # more digits than Python turns into a number
_FLOAT32_END = "3.4028235677973366e+38"


@dataclass(frozen=True, slots=True)
class BadBody:
    """A body that is refused.

    Args:
        path: the REST path it is sent to.
        data: the bytes.
        status: the status of the reply.
        error: the complete error text.
    """

    path: str
    data: bytes
    status: int
    error: str


def _parameter(text: str) -> str:
    return f'{{"inputs": "a", "parameters": {{{text}}}}}'


def _ignored(value: str) -> str:
    """A body with a value in a field that is ignored, at byte 21."""
    return f'{{"inputs": "a", "x": {value}}}'


def _schema(value: str) -> str:
    return _parameter(f'"grammar": {{"type": "json", "value": {value}}}')


def nested(depth: int, kind: str = "list") -> str:
    """Lists in lists, or objects in objects."""
    if kind == "list":
        return "[" * depth + "]" * depth
    return '{"a":' * depth + "1" + "}" * depth


# No JSON: (body, what is said after `error_texts.JSON`).
_MALFORMED: list[tuple[str | bytes, str]] = [
    # Nothing, or not all of it.
    ("", _CUT),
    (" \n\t\r ", _CUT),
    ("{", _CUT),
    ('{"inputs": "a', _CUT),
    ('{"inputs": "a"', _CUT),
    (_ignored("[")[:-1], _CUT),
    # Another language.
    ("not json", _CHARACTER.format(1)),
    ("inputs=a", _CHARACTER.format(0)),
    ('{"inputs": }', _CHARACTER.format(11)),
    ('{"inputs" "a"}', "expected ':' (byte 10)"),
    ('{"inputs": "a" "b"}', "expected ',' or '}' (byte 15)"),
    (_ignored("[1 2]"), "expected ',' or ']' (byte 24)"),
    # Single quotes.
    ("{'inputs': 'a'}", _KEY.format(1)),
    ("{\"inputs\": 'a'}", _CHARACTER.format(11)),
    ('{"inputs": "a", \'x\': 1}', _KEY.format(16)),
    # Commas that nothing follows, or that follow nothing.
    ('{"inputs": "a",}', "trailing comma in object (byte 15)"),
    (_ignored("[1,]"), "trailing comma in array (byte 24)"),
    (_ignored('{"y": 1,}'), "trailing comma in object (byte 29)"),
    (_parameter('"top_k": 1,'), "trailing comma in object (byte 42)"),
    (_parameter('"stop": ["a",]'), "trailing comma in array (byte 44)"),
    ('{,"inputs": "a"}', _KEY.format(1)),
    (_ignored("[,1]"), _CHARACTER.format(22)),
    # Keys that are no strings.
    ('{inputs: "a"}', _KEY.format(1)),
    (_parameter("top_k: 1"), _KEY.format(31)),
    ('{"inputs": "a", 1: 2}', _KEY.format(16)),
    ('{"inputs": "a", null: 2}', _KEY.format(16)),
    # Raw control characters.
    ('{"inputs": "a\nb"}', _CHARACTER.format(13)),
    ('{"inputs": "a\tb"}', _CHARACTER.format(13)),
    ('{"inputs": "a\x00b"}', _CHARACTER.format(13)),
    (_ignored('"\x1f"'), _CHARACTER.format(22)),
    ('{"a\nb": 1, "inputs": "a"}', _CHARACTER.format(3)),
    ("\x00", _CHARACTER.format(0)),
    ('\x0b{"inputs": "a"}', _CHARACTER.format(0)),
    # Comments.
    ('{"inputs": "a" /* why */}', "expected ',' or '}' (byte 15)"),
    ('{"inputs": "a" // why\n}', "expected ',' or '}' (byte 15)"),
    ('{"inputs": "a" # why\n}', "expected ',' or '}' (byte 15)"),
    ('// why\n{"inputs": "a"}', _CHARACTER.format(0)),
    # Values that other languages have.
    (_ignored("True"), _CHARACTER.format(21)),
    (_ignored("None"), _CHARACTER.format(21)),
    (_ignored("undefined"), _CHARACTER.format(21)),
    (_ignored(".5"), _CHARACTER.format(21)),
    (_ignored("1."), "invalid number (byte 23)"),
    (_ignored("1e"), "invalid number (byte 23)"),
    (_ignored("+1"), _CHARACTER.format(21)),
    (_parameter('"top_k": 01'), "invalid number (byte 41)"),
    (_parameter('"top_k": 0x10'), "expected ',' or '}' (byte 41)"),
    (_ignored('"\\x41"'), "invalid escaped character (byte 23)"),
    # What is no finite number.
    *(
        (body, _CHARACTER.format(byte))
        for value, offset in [("NaN", 0), ("Infinity", 0), ("-Infinity", 1)]
        for body, byte in [
            (_parameter(f'"temperature": {value}'), 46 + offset),
            (_ignored(value), 21 + offset),
            (_schema(value), 68 + offset),
        ]
    ),
    *(
        (body, path + _TOO_LARGE)
        for value in ("1e999", "-1e999")
        for body, path in [
            (_parameter(f'"temperature": {value}'), "parameters.temperature: "),
            (_schema(value), "parameters.grammar.value: "),
            (_ignored(value), "x: "),
            (_ignored(f'[{{"y": {value}}}]'), "x[0].y: "),
        ]
    ),
    # Something after the end.
    ('{"inputs": "a"} trailing', "trailing characters (byte 17)"),
    ('{"inputs": "a"} {}', "trailing characters (byte 17)"),
    ('{"inputs": "a"}]', "trailing characters (byte 16)"),
    ('{"inputs": "a"}\x00', "trailing characters (byte 16)"),
    # No UTF-8.
    (b'{"inputs": "\xff"}', _UTF8.format(12)),
    (b'{"inputs": "ab\xc3"}', _UTF8.format(14)),  # half a character
    (b'{"inputs": "\xc0\xaf"}', _UTF8.format(12)),  # longer than need be
    (b'{"inputs": "\xed\xa0\x80"}', _UTF8.format(12)),  # half a surrogate pair
    (b'{"inputs": "\xf4\x90\x80\x80"}', _UTF8.format(12)),  # beyond Unicode
    (b'{"inputs": "a", "x": "\xff"}', _UTF8.format(22)),
    (b'{"inputs": "a", "\xff": 1}', _UTF8.format(17)),
    (b"\xff\xfe\x00", _UTF8.format(0)),
    ('{"inputs": "a"}'.encode("utf-16"), _UTF8.format(0)),
    ('{"inputs": "a"}'.encode("utf-32-le"), _KEY.format(1)),
    (b'\xef\xbb\xbf{"inputs": "a"}', _CHARACTER.format(0)),  # a byte order mark
    # Half a surrogate pair.
    ('{"inputs": "\\udc00"}', _HALF.format(18)),
    ('{"inputs": "\\ud800\\ud800"}', _HALF.format(24)),
    ('{"inputs": "\\ud800"}', _HALF.format(18)),  # the last thing in the body
    ('{"inputs": "\\ud800 and more"}', _HALF.format(18)),
    (_ignored('"\\udc00"'), _HALF.format(28)),
    (_parameter('"\\udc00": 1'), _HALF.format(38)),
    # Too deep: the object around it counts.
    *(
        (body, _TOO_DEEP)
        for kind in ("list", "object")
        for body in [
            _ignored(nested(128, kind)),
            _ignored(nested(5_000, kind)),
            _schema(nested(126, kind)),
        ]
    ),
    (_ignored(nested(100_000)), _TOO_DEEP),
    (_ignored("[" * 100_000), _TOO_DEEP),  # and has no end
    # Two members of the same name, however it is written and wherever it is.
    ('{"inputs": "a", "inputs": "a"}', "duplicate field `inputs`"),
    ('{"inputs": "a", "\\u0069nputs": "b"}', "duplicate field `inputs`"),
    ('{"inputs": "a", "x": 1, "x": 2}', "duplicate field `x`"),
    ('{"inputs": "a", "parameters": {}, "parameters": {}}', "duplicate field `parameters`"),
    (_parameter('"top_k": 1, "top_k": 1'), "parameters: duplicate field `top_k`"),
    (_parameter('"top_k": 1, "top_k": null'), "parameters: duplicate field `top_k`"),
    (_ignored('{"y": 1, "y": 1}'), "x: duplicate field `y`"),
    (_ignored('[0, {"y": 1, "y": 2}]'), "x[1]: duplicate field `y`"),
    (
        _schema('{"type": "object", "type": "string"}'),
        "parameters.grammar.value: duplicate field `type`",
    ),
    (
        _schema('{"properties": {"a": {}, "a": {}}}'),
        "parameters.grammar.value.properties: duplicate field `a`",
    ),
    # Of several faults the first, unless what follows makes the text unreadable.
    ('{"x": NaN, "y": 01}', _CHARACTER.format(6)),
    ('{"x": 1e999, "inputs": "a", "inputs": "b"}', f"x: {_TOO_LARGE}"),
    ('{"inputs": "a", "inputs": "b", "x": 1e999}', "duplicate field `inputs`"),
    ('{"inputs": "a" "b", "inputs": 1}', "expected ',' or '}' (byte 15)"),
    ('{"inputs": "a", "inputs": "b", "x": NaN}', _CHARACTER.format(36)),
]

# No JSON, and in every path's eyes of wrong types as well.
_BOTH: list[tuple[str | bytes, str]] = [
    ('{"inputs": 1, "x": NaN}', _CHARACTER.format(19)),
    ('{"inputs": 1', _CUT),
    ('{"inputs": 1} trailing', "trailing characters (byte 15)"),
    ('{"inputs": 1, "messages": 1, "x": "\\ud800"}', _HALF.format(41)),
    (b'{"inputs": 1, "x": "\xff"}', _UTF8.format(20)),
    ('{"inputs": 1, "inputs": 2}', "duplicate field `inputs`"),
    ('{"x": 1, "x": 2, "prompt": 1}', "duplicate field `x`"),
    ('{"prompt": 1, "messages": {"y": 1, "y": 1}}', "messages: duplicate field `y`"),
    ('{"inputs": 1, "x": 1e999}', f"x: {_TOO_LARGE}"),
    (f'{{"inputs": 1, "x": {nested(128)}}}', _TOO_DEEP),
    (f'{{"x": {nested(500, "object")}, "inputs": 1}}', _TOO_DEEP),
    ("null null", "trailing characters (byte 6)"),
]


def _wrong(name: str, value: str, expected: str) -> tuple[str, str]:
    """A parameter of a wrong type: the body, and the error."""
    return _parameter(f'"{name}": {value}'), f"parameters.{name}: expected {expected}"


_INTEGERS = {
    "best_of": (0, 2**32 - 1),
    "top_k": (-(2**31), 2**31 - 1),
    "max_new_tokens": (0, 2**32 - 1),
    "truncate": (0, 2**32 - 1),
    "seed": (0, 2**64 - 1),
    "top_n_tokens": (0, 2**32 - 1),
}
_FLOATS = ("temperature", "repetition_penalty", "frequency_penalty", "top_p", "typical_p")
_PLAIN_FLAGS = ("do_sample", "watermark", "details", "decoder_input_details")
_FLAGS = (*_PLAIN_FLAGS, "return_full_text")

# Bodies of /generate, /tokenize and /invocations that are no requests: (body, text after `SHAPE`).
_GENERATE_SHAPES: list[tuple[str, str]] = [
    ("null", "expected an object, got null"),
    ("[]", "expected an object, got a list"),
    ('["a"]', "expected an object, got a list"),
    ('"inputs"', "expected an object, got a string"),
    ("1", "expected an object, got an integer"),
    ("-0.5", "expected an object, got a number"),
    ("true", "expected an object, got a boolean"),
    ('{"inputs": 1}', "inputs: expected a string, got an integer"),
    ('{"inputs": true}', "inputs: expected a string, got a boolean"),
    ('{"inputs": ["a"]}', "inputs: expected a string, got a list"),
    ('{"inputs": {}}', "inputs: expected a string, got an object"),
    ('{"inputs": "a", "parameters": "x"}', "parameters: expected an object, got a string"),
    ('{"inputs": "a", "parameters": []}', "parameters: expected an object, got a list"),
    # Flags: no truth of other languages, and no null where TGI has none.
    *(
        _wrong(name, value, f"a boolean, got {given}")
        for name in _FLAGS
        for value, given in [('"yes"', "a string"), ('"true"', "a string"), ("1", "an integer")]
    ),
    *(_wrong(name, "null", "a boolean, got null") for name in _PLAIN_FLAGS),
    ('{"inputs": "a", "parameters": null}', "parameters: expected an object, got null"),
    # Lists of texts: neither a text nor lists in them.
    _wrong("stop", '"a"', "a list, got a string"),
    _wrong("stop", "null", "a list, got null"),
    _wrong("stop", "{}", "a list, got an object"),
    (_parameter('"stop": [["Deep"]]'), "parameters.stop[0]: expected a string, got a list"),
    (_parameter('"stop": ["a", ["b"]]'), "parameters.stop[1]: expected a string, got a list"),
    (_parameter('"stop": [null]'), "parameters.stop[0]: expected a string, got null"),
    (_parameter('"stop": [1]'), "parameters.stop[0]: expected a string, got an integer"),
    # Integers.
    *(
        _wrong(name, value, f"an integer, got {given}")
        for name in _INTEGERS
        for value, given in [
            ('"1"', "a string"),
            ("1.5", "a number"),
            ("1.0", "a number"),
            ("1e2", "a number"),
            ("true", "a boolean"),
            ("[1]", "a list"),
        ]
    ),
    *(
        _wrong(name, str(value), f"an integer >= {low}")
        for name, (low, _) in _INTEGERS.items()
        for value in (low - 1, -(2**63) - 1, -(10**30))
    ),
    *(
        _wrong(name, str(value), f"an integer <= {high}")
        for name, (_, high) in _INTEGERS.items()
        for value in (high + 1, 2**64, 10**30)
    ),
    (_parameter(f'"seed": {_LONG}'), f"parameters.seed: {_TOO_LARGE}"),
    (_parameter(f'"temperature": {_LONG}'), f"parameters.temperature: {_TOO_LARGE}"),
    # Numbers.
    *(
        _wrong(name, value, f"a number, got {given}")
        for name in _FLOATS
        for value, given in [('"1.0"', "a string"), ("true", "a boolean"), ("{}", "an object")]
    ),
    *(_wrong(name, "1e39", f"a number < {_FLOAT32_END}") for name in _FLOATS),
    _wrong("temperature", "-1e308", f"a number > -{_FLOAT32_END}"),
    _wrong("temperature", "1" + "0" * 40, f"a number < {_FLOAT32_END}"),
    # Grammars.
    (_parameter('"grammar": "x"'), "parameters.grammar: expected an object, got a string"),
    (
        _parameter('"grammar": {"type": "xml", "value": "a"}'),
        "parameters.grammar.type: unknown variant `xml`",
    ),
    (
        _parameter('"grammar": {"type": null, "value": "a"}'),
        "parameters.grammar.type: expected a string, got null",
    ),
    (_parameter('"adapter_id": 1'), "parameters.adapter_id: expected a string, got an integer"),
    # Of several wrong types the first.
    ('{"inputs": 1, "parameters": {"top_k": "x"}}', "inputs: expected a string, got an integer"),
    (
        '{"parameters": {"top_k": "x"}, "inputs": 1}',
        "parameters.top_k: expected an integer, got a string",
    ),
    (
        _parameter('"temperature": 1e39, "top_k": "x"'),
        f"parameters.temperature: expected a number < {_FLOAT32_END}",
    ),
    (
        _parameter(f'"seed": {2**64}, "top_k": "x"'),
        f"parameters.seed: expected an integer <= {2**64 - 1}",
    ),
    (
        _parameter('"seed": {}, "stop": [1]'),
        "parameters.seed: expected an integer, got an object",
    ),
    (
        '{"parameters": {"stop": [1, null]}}',  # `inputs` is missing at the end
        "parameters.stop[0]: expected a string, got an integer",
    ),
    ('{"Inputs": "a"}', "missing field `inputs`"),
]

_CHAT_SHAPES: list[tuple[str, str]] = [
    ('{"messages": "hi"}', "messages: expected a list, got a string"),
    ('{"messages": {}}', "messages: expected a list, got an object"),
    ('{"messages": ["hi"]}', "messages[0]: expected an object, got a string"),
    ('{"messages": [null]}', "messages[0]: expected an object, got null"),
    (f'{{"messages": [[{_TURN}]]}}', "messages[0]: expected an object, got a list"),
    (f'{{"messages": [[{_TURN}], [{_TURN}]]}}', "messages[0]: expected an object, got a list"),
    (f'{{"messages": [{_TURN}, [{_TURN}]]}}', "messages[1]: expected an object, got a list"),
    (
        '{"messages": [{"role": 5, "content": "x"}]}',
        "messages[0].role: expected a string, got an integer",
    ),
    (
        '{"messages": [{"role": "user", "content": "x", "name": 5}]}',
        "messages[0].name: expected a string, got an integer",
    ),
    (
        '{"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}',
        "messages[0].tool_calls[0].function: missing field `name`",
    ),
    *(
        (f"{{{_MESSAGES}, {text}}}", error)
        for text, error in [
            ('"n": -1', "n: expected an integer >= 0"),
            ('"n": "two"', "n: expected an integer, got a string"),
            ('"model": 5', "model: expected a string, got an integer"),
            ('"max_tokens": 1.0', "max_tokens: expected an integer, got a number"),
            ('"logit_bias": "x"', "logit_bias: expected an object or a list, got a string"),
            ('"logprobs": 1', "logprobs: expected a boolean, got an integer"),
            ('"stream": null', "stream: expected a boolean, got null"),
            ('"stream": "yes"', "stream: expected a boolean, got a string"),
            ('"stop": 1', "stop: expected a string or a list, got an integer"),
            ('"stop": [1]', "stop[0]: expected a string, got an integer"),
            ('"stop": [["Deep"]]', "stop[0]: expected a string, got a list"),
            ('"seed": -1', "seed: expected an integer >= 0"),
            (f'"seed": {2**64}', f"seed: expected an integer <= {2**64 - 1}"),
            (f'"seed": {2**64}, "n": "x"', f"seed: expected an integer <= {2**64 - 1}"),
            ('"n": "x", "seed": -1', "n: expected an integer, got a string"),
            ('"presence_penalty": 1e39', f"presence_penalty: expected a number < {_FLOAT32_END}"),
            ('"tools": "f"', "tools: expected a list, got a string"),
            ('"tools": [{}]', "tools[0]: missing field `type`"),
            ('"tools": [{"type": "function"}]', "tools[0]: missing field `function`"),
            (
                '"tools": [{"type": "function", "function": {}}]',
                "tools[0].function: missing field `name`",
            ),
            ('"tool_prompt": 5', "tool_prompt: expected a string, got an integer"),
            ('"response_format": "json"', "response_format: expected an object, got a string"),
            ('"response_format": {}', "response_format: missing field `type`"),
            ('"response_format": {"type": "xml"}', "response_format.type: unknown variant `xml`"),
            ('"stream_options": 5', "stream_options: expected an object, got an integer"),
            (
                '"stream_options": {"include_usage": "x"}',
                "stream_options.include_usage: expected a boolean, got a string",
            ),
        ]
    ),
]

_COMPLETION_SHAPES: list[tuple[str, str]] = [
    ('{"prompt": 1}', "prompt: expected a string or a list, got an integer"),
    ('{"prompt": {"a": 1}}', "prompt: expected a string or a list, got an object"),
    ('{"prompt": [1, "a"]}', "prompt: texts, numbers and lists must not be mixed"),
    ('{"prompt": [1.5]}', "prompt[0]: expected an integer or a string or a list, got a number"),
    ('{"prompt": [["a"]]}', "prompt[0][0]: expected an integer, got a string"),
    ('{"prompt": ["a", [1]]}', "prompt: texts, numbers and lists must not be mixed"),
    ('{"prompt": ["a", ["b"]]}', "prompt[1][0]: expected an integer, got a string"),
    ('{"prompt": ["a", null]}', "prompt[1]: expected an integer or a string or a list, got null"),
    ('{"prompt": [], "suffix": "x"}', NO_PROMPT),
    ('{"prompt": [], "max_tokens": "x"}', NO_PROMPT),
    (
        f'{{"prompt": "a", "seed": {2**64}, "stop": 1}}',
        f"seed: expected an integer <= {2**64 - 1}",
    ),
    *(
        (f'{{"prompt": "a", {text}}}', error)
        for text, error in [
            ('"suffix": 1', "suffix: expected a string, got an integer"),
            ('"max_tokens": "x"', "max_tokens: expected an integer, got a string"),
            ('"stream": "x"', "stream: expected a boolean, got a string"),
            ('"stream": null', "stream: expected a boolean, got null"),
            ('"stop": [["Deep"]]', "stop[0]: expected a string, got a list"),
            (f'"seed": {2**64}', f"seed: expected an integer <= {2**64 - 1}"),
            ('"top_p": 1e39', f"top_p: expected a number < {_FLOAT32_END}"),
        ]
    ),
]

_COMPAT_SHAPES: list[tuple[str, str]] = [
    ('{"inputs": "a", "stream": 1}', "stream: expected a boolean, got an integer"),
    ('{"inputs": "a", "stream": "yes"}', "stream: expected a boolean, got a string"),
    ('{"inputs": "a", "stream": null}', "stream: expected a boolean, got null"),
]

_SHAPES: list[tuple[tuple[str, ...], list[tuple[str, str]]]] = [
    (("/generate", "/tokenize", "/invocations"), _GENERATE_SHAPES),
    (("/", "/invocations"), _COMPAT_SHAPES),
    ((CHAT, "/chat_tokenize", "/invocations"), _CHAT_SHAPES),
    ((COMPLETIONS, "/invocations"), _COMPLETION_SHAPES),
]


def _refused(path: str, body: bytes, error: str) -> BadBody:
    """What is no JSON is 400; a name that stands twice is 422, as in TGI."""
    if "duplicate field" in error:
        return BadBody(path, body, 422, SHAPE + error)
    return BadBody(path, body, 400, JSON + error)


REFUSED_JSON = [
    *(
        _refused(path, text if isinstance(text, bytes) else text.encode(), error)
        for paths, rows in [(("/generate",), _MALFORMED), (tuple(RPCS), _BOTH)]
        for text, error in rows
        for path in paths
    ),
    *(
        BadBody(path, text.encode(), 422, SHAPE + error)
        for paths, rows in _SHAPES
        for text, error in rows
        for path in paths
    ),
]

# Bodies that are accepted, although each looks like one that is not: (path, body).
ACCEPTED_JSON: list[tuple[str, str]] = [
    *(
        ("/generate", f'{{"inputs": "a", "parameters": {{"max_new_tokens": 1}}, "x": {value}}}')
        for value in [
            "null",
            '"True"',
            '"\\ud83d\\ude42"',  # both halves of a pair
            '"\\u0000\\n\x7f\u2028"',
            nested(127),
            nested(127, "object"),
            '"' + "[{" * 500 + '"',  # brackets in a text nest nothing
            "-0",
            "1e308",
            "1e-999",
            _LONG,
            '[{"y": 1}, {"y": 1}]',  # the same name in two objects
            '{"y": {"y": {"y": 1}}, "Y": 1}',
        ]
    ),
    ("/generate", ' \t\r\n{"parameters" : {"max_new_tokens" :1 } ,"inputs":"a" } \n'),
    ("/generate", '{"\\u0069nputs": "a", "parameters": {"max_new_tokens": 1}}'),
    ("/generate", _parameter('"max_new_tokens": 1, "maxNewTokens": "x", "temperature": 1')),
    # Null where TGI has it: as good as absent.
    *(
        ("/generate", _parameter(f'"max_new_tokens": 1, "{name}": null'))
        for name in [
            *(name for name in _INTEGERS if name != "max_new_tokens"),
            *_FLOATS,
            "return_full_text",
            "grammar",
            "adapter_id",
        ]
    ),
    (
        CHAT,
        f'{{{_MESSAGES}, "max_tokens": 1, "stop": null, "n": null, "tools": null, "seed": null, '
        '"tool_choice": null, "logprobs": null, "logit_bias": null, "stream_options": null}',
    ),
    (CHAT, f'{{{_MESSAGES}, "max_tokens": 1, "stop": "x", "logit_bias": [0.5]}}'),
    # A tool without a schema, as OpenAI has it.
    (
        CHAT,
        f'{{{_MESSAGES}, "max_tokens": 1, "tool_choice": "none", '
        '"tools": [{"type": "function", "function": {"name": "f"}}]}',
    ),
    # What /generate takes, and values that it would refuse: only a text is cut into tokens.
    *(
        ("/tokenize", body)
        for body in [
            _parameter('"max_new_tokens": 1, "stop": ["a"], "seed": 1, "temperature": 0.5'),
            _parameter('"temperature": 0, "top_k": -1, "max_new_tokens": 4294967295, "best_of": 9'),
            _parameter('"grammar": {"type": "json", "value": 1}, "truncate": 0'),
            '{"inputs": "a", "parameters": {}, "stream": "x"}',
        ]
    ),
    (COMPLETIONS, '{"prompt": "a", "max_tokens": 1, "stop": null, "user": 7}'),
]
