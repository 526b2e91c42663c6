"""From messages to domain requests: absent fields stay absent, JSON values keep their order."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec import requests
from service.codec.plain import plain as as_plain
from service.generation.parameters import Parameters
from service.grammar.spec import Grammar
from service.openai.chat import Message
from service.openai.tools import Tool
from service.pb.google.protobuf import ListValue, NullValue, Struct, Value
from service.pb.tokenwire import v1 as pb


def _has_fraction(number: float) -> bool:
    return not number.is_integer()


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.dictionaries(st.text(max_size=5), inner, max_size=4)
    return st.lists(inner, max_size=4) | items


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False).filter(_has_fraction),
    _containers,
    max_leaves=12,
)


def value(plain: Any) -> Value:
    """A value as parsed from the wire: every number is a double."""
    return Value.parse(bytes(Value.from_dict(plain)))


def test_absent_parameters_mean_sampling() -> None:
    assert requests.parameters(None) == Parameters(do_sample=True)


def test_empty_parameters_mean_greedy() -> None:
    assert requests.parameters(pb.GenerateParameters()) == Parameters()


def test_zeros_are_not_absent() -> None:
    message = pb.GenerateParameters(
        best_of=0,
        temperature=0.0,
        repetition_penalty=0.0,
        frequency_penalty=0.0,
        top_k=0,
        top_p=0.0,
        typical_p=0.0,
        do_sample=False,
        max_new_tokens=0,
        return_full_text=False,
        truncate=0,
        seed=0,
        top_n_tokens=0,
        adapter_id="",
    )
    assert requests.parameters(pb.GenerateParameters.parse(bytes(message))) == Parameters(
        best_of=0,
        temperature=0.0,
        repetition_penalty=0.0,
        frequency_penalty=0.0,
        top_k=0,
        top_p=0.0,
        typical_p=0.0,
        max_new_tokens=0,
        return_full_text=False,
        truncate=0,
        seed=0,
        top_n_tokens=0,
        adapter_id="",
    )


def test_all_parameters_arrive() -> None:
    message = pb.GenerateParameters(
        best_of=2,
        temperature=0.5,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        top_k=-3,
        top_p=0.25,
        typical_p=0.75,
        do_sample=True,
        max_new_tokens=7,
        return_full_text=True,
        stop=["a", ""],
        truncate=3,
        watermark=True,
        details=True,
        decoder_input_details=True,
        seed=2**64 - 1,
        top_n_tokens=4,
        grammar=pb.Grammar(type=pb.GrammarType.regex, value=value("a+")),
        adapter_id="x",
    )
    assert requests.parameters(pb.GenerateParameters.parse(bytes(message))) == Parameters(
        best_of=2,
        temperature=0.5,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        top_k=-3,
        top_p=0.25,
        typical_p=0.75,
        do_sample=True,
        max_new_tokens=7,
        return_full_text=True,
        stop=("a", ""),
        truncate=3,
        watermark=True,
        details=True,
        decoder_input_details=True,
        seed=2**64 - 1,
        top_n_tokens=4,
        grammar=Grammar(kind="regex", value="a+"),
        adapter_id="x",
    )


def test_chat_gets_the_openai_defaults() -> None:
    wanted = requests.chat_request(pb.ChatRequest())
    assert wanted.parameters == Parameters(do_sample=True, details=True, names_model=True)
    assert (wanted.stream, wanted.logprobs, wanted.n, wanted.tools) == (
        False,
        False,
        None,
        (),
    )
    assert wanted.tool_choice is None


def test_chat_parameters_get_their_names_in_generate() -> None:
    message = pb.ChatRequest(
        model="m",
        frequency_penalty=0.5,
        logprobs=True,
        top_logprobs=3,
        max_tokens=9,
        n=1,
        presence_penalty=-0.5,
        stop=["x"],
        stream=True,
        seed=0,
        temperature=0.5,
        top_p=0.25,
    )
    wanted = requests.chat_request(message)
    assert wanted.parameters == Parameters(
        do_sample=True,
        temperature=0.5,
        top_p=0.25,
        frequency_penalty=0.5,
        repetition_penalty=1.5,
        max_new_tokens=9,
        stop=("x",),
        seed=0,
        top_n_tokens=3,
        adapter_id="m",
        names_model=True,
        details=True,
    )
    assert wanted.stream
    assert wanted.logprobs
    assert wanted.n == 1


@pytest.mark.parametrize(
    ("presence", "repetition"), [(None, None), (0.0, 2.0), (-1.0, 1.0), (-2.0, 0.0), (1.5, 3.5)]
)
def test_repetition_penalty_is_presence_penalty_plus_two(
    presence: float | None, repetition: float | None
) -> None:
    wanted = requests.chat_request(pb.ChatRequest(presence_penalty=presence))
    assert wanted.parameters.repetition_penalty == repetition


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.0, (False, None)), (-0.0, (False, None)), (None, (True, None)), (1.0, (True, 1.0))],
)
def test_a_temperature_of_zero_is_greedy(
    temperature: float | None, expected: tuple[bool, float | None]
) -> None:
    chat = requests.chat_request(pb.ChatRequest(temperature=temperature)).parameters
    prompts = requests.completions_request(
        pb.CompletionsRequest(temperature=temperature)
    ).parameters
    for parameters in (chat, prompts):
        assert (parameters.do_sample, parameters.temperature) == expected


def test_completions_get_the_openai_defaults() -> None:
    wanted = requests.completions_request(pb.CompletionsRequest())
    assert wanted.prompts == ()
    assert wanted.suffix is None
    assert not wanted.stream
    assert wanted.parameters == Parameters(do_sample=True, details=True, names_model=True)


def test_completions_parameters_get_their_names_in_generate() -> None:
    message = pb.CompletionsRequest(
        model="m",
        prompt=["a", ""],
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        stream=True,
        seed=4,
        suffix="",
        repetition_penalty=1.25,
        frequency_penalty=1.0,
        stop=["x"],
    )
    wanted = requests.completions_request(pb.CompletionsRequest.parse(bytes(message)))
    assert wanted.prompts == ("a", "")
    assert wanted.suffix == ""
    assert wanted.stream
    assert wanted.parameters == Parameters(
        do_sample=True,
        temperature=0.5,
        top_p=0.25,
        frequency_penalty=1.0,
        repetition_penalty=1.25,
        max_new_tokens=3,
        stop=("x",),
        seed=4,
        adapter_id="m",
        names_model=True,
        details=True,
    )


@pytest.mark.parametrize(
    ("fields", "top_n", "scores_prompt"),
    [
        ({"top_logprobs": 3}, None, False),
        ({"logprobs": True}, 0, False),
        ({"logprobs": True, "top_logprobs": 3}, 3, False),
        ({"logprobs": True, "top_logprobs": 3, "echo": True}, 3, True),
        ({"echo": True}, None, False),
    ],
)
def test_completions_ask_for_log_probabilities(
    fields: dict[str, Any], top_n: int | None, scores_prompt: bool
) -> None:
    wanted = requests.completions_request(pb.CompletionsRequest(prompt=["a"], **fields))
    assert wanted.logprobs == (top_n is not None)
    assert wanted.parameters.top_n_tokens == top_n
    assert wanted.parameters.decoder_input_details == scores_prompt
    assert wanted.parameters.prompt_top_n_tokens == (top_n if scores_prompt else 0)
    assert bool(wanted.parameters.return_full_text) == wanted.echo == ("echo" in fields)


def test_no_tokens_are_an_answer_only_with_the_prompt() -> None:
    alone = requests.completions_request(pb.CompletionsRequest(max_tokens=0, echo=True))
    assert (alone.is_prompt_alone, alone.parameters.max_new_tokens) == (True, 1)
    refused = requests.completions_request(pb.CompletionsRequest(max_tokens=0))
    assert (refused.is_prompt_alone, refused.parameters.max_new_tokens) == (False, 0)


SCHEMA = {"type": "object", "properties": {"z": {"maximum": 3}, "a": {"minimum": 0.5}}}
Format = pb.ResponseFormatType


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (None, None),
        (pb.ResponseFormat(type=Format.TEXT), None),
        (pb.ResponseFormat(type=Format.JSON, value=value(SCHEMA)), ("json", SCHEMA)),
        (pb.ResponseFormat(type=Format.REGEX, value=value("a+")), ("regex", "a+")),
        (pb.ResponseFormat(type=Format.JSON_OBJECT), ("json", {"type": "object"})),
        (pb.ResponseFormat(type=Format.JSON_OBJECT, value=value(SCHEMA)), ("json", SCHEMA)),
        (
            pb.ResponseFormat(
                type=Format.JSON_SCHEMA, json_schema=pb.JsonSchema(name="n", schema=value(SCHEMA))
            ),
            ("json", SCHEMA),
        ),
        (pb.ResponseFormat(), ("", None)),
    ],
)
def test_response_formats_become_grammars(message: pb.ResponseFormat | None, expected: Any) -> None:
    wanted = requests.chat_request(pb.ChatRequest(response_format=message))
    assert wanted.parameters.grammar == (expected and Grammar(kind=expected[0], value=expected[1]))


@pytest.mark.parametrize(
    "content", ["", "hi", [{"type": "text", "text": "hi"}], {"unexpected": 1}, 5, True, None]
)
def test_content_is_any_json(content: Any) -> None:
    message = pb.Message(role="user", content=value(content), name="me", tool_call_id="c")
    assert requests.chat_request(pb.ChatRequest(messages=[message])).messages == (
        Message(role="user", content=content, name="me", tool_call_id="c"),
    )


def test_an_empty_message_has_neither_role_nor_content() -> None:
    wanted = requests.chat_request(pb.ChatRequest(messages=[pb.Message()]))
    assert wanted.messages == (Message(role=None),)


@pytest.mark.parametrize("arguments", [None, "{}", {"b": 1, "a": [1.5]}])
def test_tool_calls_of_earlier_answers_are_converted(arguments: Any) -> None:
    call = pb.ToolCall(id="1", function=pb.FunctionCall(name="f", arguments=value(arguments)))
    message = pb.Message(role="assistant", tool_calls=[call, pb.ToolCall(type="x")])
    assert requests.chat_request(pb.ChatRequest(messages=[message])).messages[0].tool_calls == (
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}},
        {"id": "", "type": "x", "function": {"name": "", "arguments": None}},
    )


@pytest.mark.parametrize(
    "choice", ["auto", "none", {"type": "function", "function": {"name": "f"}}]
)
def test_tools_and_their_choice_are_converted(choice: Any) -> None:
    tool = pb.Tool(type="function", function=pb.FunctionDefinition(name="f"))
    wanted = requests.chat_request(pb.ChatRequest(tools=[tool], tool_choice=value(choice)))
    assert wanted.tools == (Tool(name="f"),)
    assert wanted.tool_choice == choice


@given(JSON)
def test_json_values_keep_their_order_and_integers(plain: Any) -> None:
    back = as_plain(value(plain))
    assert json.dumps(back) == json.dumps(plain)


def test_an_absent_value_is_none() -> None:
    assert as_plain(None) is None


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_and_infinity_do_not_fail(number: float) -> None:
    back = as_plain(Value(list_value=ListValue(values=[Value(number_value=number)])))
    assert str(back) == f"[{number}]"


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        (Value(), None),
        (Value(list_value=ListValue(values=[Value()])), [None]),
        (Value(struct_value=Struct(fields={"a": Value()})), {"a": None}),
    ],
)
def test_a_value_of_no_kind_is_null(odd: Value, expected: Any) -> None:
    assert as_plain(Value.parse(bytes(odd))) == expected


def test_null_is_none() -> None:
    assert as_plain(Value(null_value=NullValue.NULL_VALUE)) is None
