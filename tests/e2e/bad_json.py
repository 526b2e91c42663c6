"""Bodies that the JSON parser of Envoy refuses, with the words of the parser.

No typed message can hold these values, so there is no gRPC request to compare with.
"""

from __future__ import annotations

from tests.e2e.refusal import CHAT, COMPLETIONS


def _parameter(text: str) -> str:
    return f'{{"inputs": "a", "parameters": {{{text}}}}}'


def _wrong(name: str, value: str, kind: str) -> tuple[str, str]:
    """A parameter of a wrong type: the body, and the text of the parser."""
    error = f"parameters.{name}: invalid value {value} for type {kind}"
    return _parameter(f'"{name}": {value}'), error


_NO_LIST = "Proto field is not repeating, cannot start list."
_NO_OBJECT = "invalid value Starting an object on a scalar field for type"
_MESSAGE = "type.googleapis.com/tokenwire.v1"

# Bodies of /generate and /invocations: (text, error after `error_texts.SHAPE`).
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

# (path, text, error after `error_texts.SHAPE`).
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
