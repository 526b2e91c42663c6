"""Refused requests to `/v1/completions`."""

from __future__ import annotations

from typing import Any

from tests.e2e import error_texts as texts
from tests.e2e.error_texts import MAX_TOTAL
from tests.e2e.refusal import COMPLETIONS, Row


def _completion(error: str, field: str, error_type: str = "validation", **changes: Any) -> Row:
    body = {"prompt": ["a"], "max_tokens": 2, **changes}
    body_error = texts.SHAPE + texts.NO_PROMPT if body["prompt"] == [] else None
    return Row(COMPLETIONS, body, error, field, error_type, body_error=body_error)


def _completion_parameter(error: str, field: str, **changes: Any) -> list[Row]:
    row = _completion(texts.VALIDATION + error, field, **changes)
    body = {**row.body, "stream": True}
    return [row, Row(COMPLETIONS, body, row.error, row.field, in_band=True)]


COMPLETION_ROWS = [
    _completion(f"{texts.SHAPE}missing field `prompt`", "prompt", prompt=[]),
    _completion(texts.SUFFIX, "suffix", "suffix not supported", suffix="x"),
    _completion(texts.SUFFIX, "suffix", "suffix not supported", suffix="", stream=True),
    _completion(texts.BATCH_SIZE, "prompt", "batch size exceeded", prompt=["a"] * 5),
    _completion(texts.BATCH_SIZE, "prompt", "batch size exceeded", prompt=["a"] * 100, stream=True),
    # Several faults. Checked in this order: the suffix, the number of prompts, the parameters. Over
    # REST an empty list of prompts is a fault of the body, and so comes before all others.
    _completion(texts.SUFFIX, "suffix", "suffix not supported", suffix="", prompt=[]),
    _completion(texts.SUFFIX, "suffix", "suffix not supported", suffix="x", prompt=[""] * 5),
    _completion(texts.BATCH_SIZE, "prompt", "batch size exceeded", prompt=[""] * 5, max_tokens=0),
    _completion(texts.VALIDATION + texts.MAX_NEW, "max_tokens", prompt=["", ""], max_tokens=0),
    _completion(texts.VALIDATION + texts.EMPTY, "prompt", prompt=["a", "", "a"]),
    *_completion_parameter(texts.EMPTY, "prompt", prompt=[""]),
    *_completion_parameter(texts.TEMPERATURE, "temperature", temperature=-0.5),
    *_completion_parameter(texts.REPETITION, "repetition_penalty", repetition_penalty=0),
    *_completion_parameter(texts.FREQUENCY, "frequency_penalty", frequency_penalty=2.5),
    *_completion_parameter(texts.TOP_P, "top_p", top_p=1.0),
    *_completion_parameter(texts.MAX_NEW, "max_tokens", max_tokens=0),
    *_completion_parameter(texts.stop(6), "stop", stop=["x"] * 6),
    *_completion_parameter(texts.total(2, MAX_TOTAL - 1), "max_tokens", max_tokens=MAX_TOTAL - 1),
]
