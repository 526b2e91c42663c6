"""A REST body and a gRPC message with the same fields become the same request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec.requests import READERS
from service.errors import ErrorKind, ServiceError
from service.generation.parameters import Parameters
from service.grammar.spec import Grammar
from service.pb.tokenwire import v1 as pb
from tests.service.fakes import LIMITS

MESSAGES: dict[str, Any] = {
    "Generate": pb.GenerateRequest,
    "CompatGenerate": pb.CompatGenerateRequest,
    "Chat": pb.ChatRequest,
    "Completions": pb.CompletionsRequest,
    "Invocations": pb.InvocationsRequest,
    "Tokenize": pb.TokenizeRequest,
}


def from_body(method: str, body: Any) -> Any:
    return READERS[method].from_body(json.dumps(body).encode(), LIMITS)


def from_message(method: str, body: Any) -> Any:
    """The request of a message that google's rules for JSON make of the same fields."""
    if wanted := body.get("response_format"):  # whose types the enum spells its own way
        wanted = {**wanted, "type": f"TYPE_{wanted['type'].upper()}"}
        body = {**body, "response_format": wanted}
    return READERS[method].from_message(
        MESSAGES[method].parse(bytes(MESSAGES[method].from_dict(body)))
    )


FLOATS = st.floats(-1024, 1024, width=32, allow_subnormal=False)
UNSIGNED = st.integers(0, 2**32 - 1)
TEXT = st.text(max_size=8)
SEEDS = st.integers(0, 2**64 - 1)
SCHEMAS = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "best_of": UNSIGNED,
        "temperature": FLOATS,
        "repetition_penalty": FLOATS,
        "frequency_penalty": FLOATS,
        "top_k": st.integers(-(2**31), 2**31 - 1),
        "top_p": FLOATS,
        "typical_p": FLOATS,
        "min_p": FLOATS,
        "do_sample": st.booleans(),
        "max_new_tokens": UNSIGNED,
        "min_new_tokens": UNSIGNED,
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(UNSIGNED, max_size=3),
        "return_full_text": st.booleans(),
        "stop": st.lists(TEXT, max_size=3),
        "truncate": UNSIGNED,
        "watermark": st.booleans(),
        "details": st.booleans(),
        "decoder_input_details": st.booleans(),
        "seed": SEEDS,
        "top_n_tokens": UNSIGNED,
        "grammar": st.fixed_dictionaries(
            {"type": st.sampled_from(["json", "json_object", "regex"]), "value": SCHEMAS}
        ),
        "adapter_id": TEXT,
    },
)
GENERATE = st.fixed_dictionaries({"inputs": TEXT}, optional={"parameters": PARAMETERS})
OPENAI = {
    "model": TEXT,
    "frequency_penalty": FLOATS,
    "max_tokens": UNSIGNED,
    "stop": st.lists(TEXT, max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "seed": SEEDS,
    "temperature": FLOATS,
    "top_p": FLOATS,
    "min_p": FLOATS,
    "min_tokens": UNSIGNED,
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(UNSIGNED, max_size=3),
}
TOOLS = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": TEXT},
            optional={"description": TEXT, "parameters": SCHEMAS, "arguments": SCHEMAS},
        ),
    }
)
TURNS = st.fixed_dictionaries(
    {"role": TEXT},
    optional={
        "content": TEXT | st.lists(st.fixed_dictionaries({"type": TEXT, "text": TEXT}), max_size=2),
        "name": TEXT,
        "tool_call_id": TEXT,
        "reasoning_content": TEXT,
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {
                    "id": TEXT,
                    "type": st.just("function"),
                    "function": st.fixed_dictionaries({"name": TEXT, "arguments": SCHEMAS}),
                }
            ),
            max_size=2,
        ),
    },
)
JSON_TYPES = st.sampled_from(["json", "json_object", "json_schema"])
NAMED = st.fixed_dictionaries({"schema": SCHEMAS})
FORMATS = st.one_of(
    st.fixed_dictionaries(
        {"type": JSON_TYPES | st.sampled_from(["regex", "text"])}, optional={"value": SCHEMAS}
    ),
    st.fixed_dictionaries({"type": JSON_TYPES, "json_schema": NAMED}),
    st.fixed_dictionaries({"type": JSON_TYPES, "schema": SCHEMAS}),
)
VARIABLES = st.dictionaries(TEXT, st.none() | st.booleans() | TEXT | st.lists(TEXT), max_size=2)
CHAT = st.fixed_dictionaries(
    {"messages": st.lists(TURNS, min_size=1, max_size=3)},
    optional={
        **OPENAI,
        "logprobs": st.booleans(),
        "top_logprobs": UNSIGNED,
        "max_completion_tokens": UNSIGNED,
        "n": UNSIGNED,
        "presence_penalty": FLOATS,
        "tools": st.lists(TOOLS, max_size=2),
        "tool_prompt": TEXT,
        "tool_choice": TEXT,
        "response_format": FORMATS,
        "parallel_tool_calls": st.booleans(),
        "chat_template_kwargs": VARIABLES,
        "reasoning_effort": TEXT,
        "documents": st.lists(VARIABLES, max_size=2),
        "add_generation_prompt": st.booleans(),
        "continue_final_message": st.booleans(),
        "escape_special_tokens": st.booleans(),
    },
)
COMPLETIONS = st.fixed_dictionaries(
    {"prompt": st.lists(TEXT, min_size=1, max_size=3)},
    optional={**OPENAI, "suffix": TEXT, "repetition_penalty": FLOATS},
)


@given(GENERATE, st.booleans())
def test_texts_are_the_same_over_both_faces(body: dict[str, Any], stream: bool) -> None:
    assert from_body("Generate", body) == from_message("Generate", body)
    body |= {"stream": stream}
    assert from_body("CompatGenerate", body) == from_message("CompatGenerate", body)
    assert from_body("Invocations", body) == from_body("CompatGenerate", body)
    assert from_message("Invocations", body) == from_message("CompatGenerate", body)


@given(CHAT)
def test_conversations_are_the_same_over_both_faces(body: dict[str, Any]) -> None:
    assert from_body("Chat", body) == from_message("Chat", body)
    assert from_body("Invocations", body) == from_body("Chat", body)
    assert from_message("Invocations", body) == from_message("Chat", body)


@given(COMPLETIONS)
def test_prompts_are_the_same_over_both_faces(body: dict[str, Any]) -> None:
    assert from_body("Completions", body) == from_message("Completions", body)
    assert from_body("Invocations", body) == from_body("Completions", body)
    assert from_message("Invocations", body) == from_message("Completions", body)


def generate_parameters(parameters: dict[str, Any]) -> Parameters:
    request = from_body("Generate", {"inputs": "a", "parameters": parameters})
    assert isinstance(request.parameters, Parameters)
    return request.parameters


class TestNulls:
    """They mean what they mean in TGI."""

    def test_max_new_tokens_null_is_as_many_as_fit(self) -> None:
        assert generate_parameters({"max_new_tokens": None}).max_new_tokens is None
        assert generate_parameters({}).max_new_tokens == 100
        assert generate_parameters({"max_new_tokens": 7}).max_new_tokens == 7

    def test_tool_prompt_null_is_an_empty_text(self) -> None:
        chat = {"messages": [{"role": "user", "content": "a"}]}
        assert from_body("Chat", {**chat, "tool_prompt": None}).tool_prompt == ""
        assert from_body("Chat", chat).tool_prompt is None
        assert from_body("Chat", {**chat, "tool_prompt": "b"}).tool_prompt == "b"

    def test_max_tokens_null_is_absent(self) -> None:
        chat = from_body("Chat", {"messages": [], "max_tokens": None})
        assert chat.parameters.max_new_tokens == 100
        completions = from_body("Completions", {"prompt": "a", "max_tokens": None})
        assert completions.parameters.max_new_tokens == 100

    def test_other_nullable_parameters_are_absent(self) -> None:
        numbers = ("best_of", "temperature", "top_k", "top_p", "typical_p", "truncate", "seed")
        penalties = ("repetition_penalty", "frequency_penalty")
        others = ("return_full_text", "top_n_tokens", "grammar", "adapter_id")
        names = (*numbers, *penalties, *others)
        assert generate_parameters(dict.fromkeys(names)) == generate_parameters({})

    def test_a_null_in_a_list_is_refused(self) -> None:
        with pytest.raises(
            ServiceError, match=r"prompt\[1\]: expected an integer or a string or a list, got null"
        ):
            from_body("Completions", {"prompt": ["a", None]})


class TestTextsForLists:
    """OpenAI's clients may send one text where the contract has a list."""

    def test_a_prompt(self) -> None:
        assert from_body("Completions", {"prompt": "a"}).prompts == ("a",)

    def test_a_stop_sequence(self) -> None:
        chat = from_body("Chat", {"messages": [], "stop": "a"})
        assert chat.parameters.stop == ("a",)


def test_numbers_in_a_schema_are_exact() -> None:
    schema = {"enum": [2512292042121000001, 2**63, 0.1]}
    grammar = {"type": "json", "value": schema}
    assert generate_parameters({"grammar": grammar}).grammar == Grammar(kind="json", value=schema)


def test_keys_keep_their_order() -> None:
    properties = {"zeta": {}, "alpha": {}, "mid": {}}
    grammar = {"type": "json", "value": {"properties": properties}}
    read = generate_parameters({"grammar": grammar}).grammar
    assert read is not None
    assert list(read.value["properties"]) == list(properties)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "missing field `inputs`"),
        ({"inputs": None, "messages": None}, "missing field `inputs`"),
        (
            {"inputs": "a", "messages": [{"role": "user"}]},
            "one of `inputs`, `messages` and `prompt` must be set. Given: `inputs` and `messages`",
        ),
    ],
)
def test_an_invocation_is_exactly_one_request(body: dict[str, Any], text: str) -> None:
    with pytest.raises(ServiceError) as caught:
        from_body("Invocations", body)
    assert caught.value.reason == text


@pytest.mark.parametrize("name", ["temperature", "top_p", "typical_p"])
def test_a_number_beyond_float32_is_refused(name: str) -> None:
    with pytest.raises(ServiceError) as caught:
        generate_parameters({name: 1e39})
    assert caught.value.kind is ErrorKind.SHAPE
    assert name in caught.value.message


def test_a_seed_has_64_bits() -> None:
    assert generate_parameters({"seed": 2**64 - 1}).seed == 2**64 - 1
    with pytest.raises(ServiceError, match="seed: expected an integer <= 18446744073709551615"):
        generate_parameters({"seed": 2**64})


def test_conversations_cannot_be_nested() -> None:
    turn = {"role": "user", "content": "a"}
    with pytest.raises(ServiceError, match=r"messages\[0\]: expected an object, got a list"):
        from_body("Chat", {"messages": [[turn], [turn]]})
