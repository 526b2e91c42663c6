"""Refused requests to `/generate` and to the paths that take the same parameters."""

from __future__ import annotations

from typing import Any

from tests.e2e import error_texts as texts
from tests.e2e.error_texts import MAX_INPUT, MAX_TOTAL
from tests.e2e.refusal import Row, no_number

# The paths that take the parameters of /generate, and how each of them is asked for a stream.
_GENERATE_PATHS = ("/generate", "/generate_stream", "/", "/invocations")
_STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/generate_stream", {}),
    ("/", {"stream": True}),
    ("/invocations", {"stream": True}),
]

# One parameter out of bounds, mostly by the smallest step: (parameters, text, field). Numbers are
# float32: 1e-46 is 0 and 0.99999999 is 1.
_PARAMETERS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 0}, texts.TEMPERATURE, "temperature"),
    ({"temperature": -0.0}, texts.TEMPERATURE, "temperature"),
    ({"temperature": 1e-46}, texts.TEMPERATURE, "temperature"),
    ({"temperature": -1e-45}, texts.TEMPERATURE, "temperature"),
    ({"temperature": -1}, texts.TEMPERATURE, "temperature"),
    ({"temperature": "NaN"}, texts.TEMPERATURE, "temperature"),
    ({"temperature": "Infinity"}, texts.TEMPERATURE, "temperature"),
    ({"temperature": "-Infinity"}, texts.TEMPERATURE, "temperature"),
    ({"repetition_penalty": 0}, texts.REPETITION, "repetition_penalty"),
    ({"repetition_penalty": -1.5}, texts.REPETITION, "repetition_penalty"),
    ({"repetition_penalty": "NaN"}, texts.REPETITION, "repetition_penalty"),
    ({"repetition_penalty": "Infinity"}, texts.REPETITION, "repetition_penalty"),
    ({"frequency_penalty": 2.0000003}, texts.FREQUENCY, "frequency_penalty"),
    ({"frequency_penalty": -2.0000003}, texts.FREQUENCY, "frequency_penalty"),
    ({"frequency_penalty": 1e38}, texts.FREQUENCY, "frequency_penalty"),
    ({"frequency_penalty": "NaN"}, texts.FREQUENCY, "frequency_penalty"),
    ({"frequency_penalty": "-Infinity"}, texts.FREQUENCY, "frequency_penalty"),
    ({"top_p": 0}, texts.TOP_P, "top_p"),
    ({"top_p": -0.5}, texts.TOP_P, "top_p"),
    ({"top_p": 0.99999999}, texts.TOP_P, "top_p"),
    ({"top_p": 1}, texts.TOP_P, "top_p"),
    ({"top_p": 1.0000002}, texts.TOP_P, "top_p"),
    ({"top_p": "NaN"}, texts.TOP_P, "top_p"),
    ({"typical_p": 0}, texts.TYPICAL_P, "typical_p"),
    ({"typical_p": -1}, texts.TYPICAL_P, "typical_p"),
    ({"typical_p": 1}, texts.TYPICAL_P, "typical_p"),
    ({"typical_p": 95}, texts.TYPICAL_P, "typical_p"),
    ({"typical_p": "NaN"}, texts.TYPICAL_P, "typical_p"),
    ({"top_k": 0}, texts.TOP_K, "top_k"),
    ({"top_k": -1}, texts.TOP_K, "top_k"),
    ({"top_k": -(2**31)}, texts.TOP_K, "top_k"),
    ({"max_new_tokens": 0}, texts.MAX_NEW, "max_new_tokens"),
    ({"stop": ["x"] * 5}, texts.stop(5), "stop"),
    ({"stop": [""] * 100}, texts.stop(100), "stop"),
    ({"top_n_tokens": 6}, texts.top_n(6), "top_n_tokens"),
    ({"top_n_tokens": 2**32 - 1}, texts.top_n(2**32 - 1), "top_n_tokens"),
    ({"truncate": 0}, texts.truncate(0), "truncate"),
    ({"truncate": MAX_INPUT + 1}, texts.truncate(MAX_INPUT + 1), "truncate"),
    ({"truncate": 2**32 - 1}, texts.truncate(2**32 - 1), "truncate"),
    ({"max_new_tokens": MAX_TOTAL - 1}, texts.total(2, MAX_TOTAL - 1), "max_new_tokens"),
    ({"max_new_tokens": 2**32 - 1}, texts.total(2, 2**32 - 1), "max_new_tokens"),
    ({"truncate": 1, "max_new_tokens": MAX_TOTAL}, texts.total(1, MAX_TOTAL), "max_new_tokens"),
]

# Rules that apply only without a stream.
_BEST_OF: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 3, "do_sample": True}, texts.best_of(3), "best_of"),
    ({"best_of": 3}, texts.best_of(3), "best_of"),
    ({"best_of": 2**32 - 1, "top_k": 0}, texts.best_of(2**32 - 1), "best_of"),
    ({"best_of": 2}, texts.SAMPLING, "best_of"),
    ({"best_of": 2, "seed": 1}, texts.SAMPLING, "best_of"),
    ({"best_of": 2, "do_sample": True, "seed": 0}, texts.SEED, "seed"),
    ({"best_of": 2, "temperature": 1.0, "seed": 1}, texts.SEED, "seed"),
    ({"best_of": 2, "typical_p": 0.5, "seed": 2**64 - 1}, texts.SEED, "seed"),
]

# Rules that apply only to streams; they are checked before all others.
_IN_STREAMS: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 0}, texts.NO_BEST_OF, "best_of"),
    ({"best_of": 2, "do_sample": True}, texts.NO_BEST_OF, "best_of"),
    ({"best_of": 3, "decoder_input_details": True, "temperature": 0}, texts.NO_BEST_OF, "best_of"),
    ({"decoder_input_details": True}, texts.NO_PREFILL, "decoder_input_details"),
    ({"decoder_input_details": True, "top_k": 0}, texts.NO_PREFILL, "decoder_input_details"),
]

# All rules of one generation in TGI's order, each broken once. They do not exclude each other: a
# request that breaks a rule and all later ones must get the error of the first of them.
_ORDER: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 3}, texts.best_of(3), "best_of"),
    ({"temperature": 0, "best_of": 2}, texts.TEMPERATURE, "temperature"),
    ({"repetition_penalty": 0}, texts.REPETITION, "repetition_penalty"),
    ({"frequency_penalty": 3}, texts.FREQUENCY, "frequency_penalty"),
    ({"top_p": 1}, texts.TOP_P, "top_p"),
    ({"typical_p": 1}, texts.TYPICAL_P, "typical_p"),
    ({"top_k": 0}, texts.TOP_K, "top_k"),
    ({"max_new_tokens": 0}, texts.MAX_NEW, "max_new_tokens"),
    ({"stop": ["x"] * 5}, texts.stop(5), "stop"),
    ({"seed": 1, "best_of": 2, "do_sample": True}, texts.SEED, "seed"),
    ({"top_n_tokens": 6}, texts.top_n(6), "top_n_tokens"),
    ({"inputs": ""}, texts.EMPTY, "inputs"),
    ({"truncate": 0}, texts.truncate(0), "truncate"),
    ({"max_new_tokens": MAX_TOTAL}, texts.total(2, MAX_TOTAL), "max_new_tokens"),
]


def _generate(path: str, parameters: dict[str, Any], error: str, field: str, **more: Any) -> Row:
    body = {"inputs": "a", "parameters": parameters, **more}
    name = f"parameters.{field}"
    return Row(
        path,
        body,
        texts.VALIDATION + error,
        name,
        in_band=path == "/generate_stream" or body.get("stream", False),
        body_error=no_number(name, parameters.get(field)),
    )


def _ordered(index: int) -> Row:
    """A request that breaks the rule at `index` and all that follow it."""
    parameters: dict[str, Any] = {}
    for broken, _, _ in reversed(_ORDER[index:]):
        parameters |= broken
    inputs = parameters.pop("inputs", "a")
    _, error, field = _ORDER[index]
    path = field if field == "inputs" else f"parameters.{field}"
    return Row(
        "/generate", {"inputs": inputs, "parameters": parameters}, texts.VALIDATION + error, path
    )


GENERATE_ROWS = [
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
        Row(path, {"inputs": "", **more}, texts.VALIDATION + texts.EMPTY, "inputs", in_band=True)
        for path, more in _STREAMS
    ),
    *(
        Row(path, {"inputs": ""}, texts.VALIDATION + texts.EMPTY, "inputs")
        for path in ("/generate", "/", "/invocations")
    ),
    # Without the text no parameter is checked.
    Row(
        "/generate",
        {"parameters": {"temperature": 0, "best_of": 3}},
        f"{texts.SHAPE}missing field `inputs`",
        "inputs",
    ),
]
