"""Texts that a grammar constrains, over REST and gRPC, and the tokens that it forces."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.e2e.contract import events
from tests.e2e.grammars import BY_SCHEMA, DATE, RANDOM, SCHEMA, check, generate, ids
from tests.e2e.reflection_client import ReflectionClient, as_dict
from tests.e2e.stack import PROMPT, Stack


class TestGenerate:
    def test_text_matches_the_regular_expression(self, stack: Stack) -> None:
        for seed in range(5):
            result = generate(stack, DATE, **RANDOM, seed=seed)
            assert re.fullmatch(DATE["value"], result["generated_text"])
            assert result["details"]["finish_reason"] == "eos_token"

    @pytest.mark.parametrize("kind", ["json", "json_object"])
    @pytest.mark.parametrize("value", [SCHEMA, json.dumps(SCHEMA)], ids=["object", "text"])
    def test_text_fits_the_schema(self, stack: Stack, kind: str, value: Any) -> None:
        grammar = {"type": kind, "value": value}
        greedy = generate(stack, grammar)
        check(greedy["generated_text"])
        assert greedy["generated_text"] == generate(stack, BY_SCHEMA)["generated_text"]
        for seed in range(5):
            result = generate(stack, grammar, **RANDOM, seed=seed)
            check(result["generated_text"])
            assert result["details"]["finish_reason"] == "eos_token"

    @pytest.mark.parametrize(
        "schema",
        [
            {"enum": ["é", "🙂", '"', None, 5, [True]]},
            {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 4},
            {"type": "string", "minLength": 2, "maxLength": 4},
            {"type": "string", "format": "date"},
            {"type": "string", "pattern": "^[a-f]{3}$"},
            {"type": "number", "minimum": -1, "exclusiveMaximum": 1},
            {"oneOf": [{"const": "a"}, {"const": 1}]},
            {"$ref": "#/$defs/Yes", "$defs": {"Yes": {"type": ["boolean", "null"]}}},
            {
                "type": "object",
                "properties": {"next": {"$ref": "#"}, "end": {"const": 0}},
                "required": ["end"],
                "additionalProperties": False,
            },
        ],
    )  # fmt: skip
    def test_text_fits_schemas_of_all_kinds(self, stack: Stack, schema: dict[str, Any]) -> None:
        for seed in range(3):
            grammar = {"type": "json", "value": json.dumps(schema)}
            result = generate(stack, grammar, **RANDOM, seed=seed, max_new_tokens=300)
            if (
                result["details"]["finish_reason"] == "eos_token"
            ):  # a number may be longer than the limit
                check(result["generated_text"], schema)

    @pytest.mark.parametrize("grammar", [DATE, BY_SCHEMA], ids=["regex", "json"])
    def test_tokens_are_the_same_over_grpc(
        self, stack: Stack, api: ReflectionClient, grammar: dict[str, Any]
    ) -> None:
        parameters = {"grammar": grammar, "max_new_tokens": 60, "details": True, "top_n_tokens": 2}
        for more in ({}, {**RANDOM, "seed": 3}):
            rest = stack.generate(**parameters, **more)
            reply = as_dict(
                api.call("Generate", {"inputs": PROMPT, "parameters": {**parameters, **more}})
            )
            assert reply["generated_text"] == rest["generated_text"]
            reason = rest["details"]["finish_reason"].upper()
            assert reply["details"]["finish_reason"] == f"FINISH_REASON_{reason}"
            assert ids(reply["details"]["tokens"]) == ids(rest["details"]["tokens"])
            assert [ids(step["tokens"]) for step in reply["details"]["top_tokens"]] == [
                ids(step) for step in rest["details"]["top_tokens"]
            ]

    def test_grpc_takes_the_schema_as_an_object(self, api: ReflectionClient) -> None:
        parameters = {"grammar": {"type": "json", "value": SCHEMA}, "max_new_tokens": 60}
        reply = api.call("Generate", {"inputs": PROMPT, "parameters": parameters})
        check(reply.generated_text)

    def test_stream_equals_the_whole_answer(self, stack: Stack, api: ReflectionClient) -> None:
        whole = generate(stack, BY_SCHEMA)
        tokens = whole["details"]["tokens"]
        parameters = {"grammar": BY_SCHEMA, "max_new_tokens": 60, "details": True}
        body = {"inputs": PROMPT, "parameters": parameters}
        stream = [
            json.loads(item) for item in events(stack.http.post("/generate_stream", json=body))
        ]
        assert [event["token"] for event in stream] == tokens
        assert [event["index"] for event in stream] == list(range(1, len(tokens) + 1))
        assert stream[-1]["generated_text"] == whole["generated_text"]
        assert stream[-1]["details"]["generated_tokens"] == len(tokens)
        assert all(event["generated_text"] is None for event in stream[:-1])
        replies = api.collect("GenerateStream", body)
        assert [reply.token.id for reply in replies] == ids(tokens)
        assert replies[-1].generated_text == whole["generated_text"]

    def test_every_candidate_of_best_of_fits(self, stack: Stack) -> None:
        result = generate(stack, BY_SCHEMA, **RANDOM, best_of=2)
        (loser,) = result["details"]["best_of_sequences"]
        check(result["generated_text"])
        check(loser["generated_text"])

    def test_echoed_prompt_is_not_constrained(self, stack: Stack) -> None:
        result = generate(stack, DATE, return_full_text=True, decoder_input_details=True)
        assert re.fullmatch(re.escape(PROMPT) + DATE["value"], result["generated_text"])
        assert len(result["details"]["prefill"]) > 1

    def test_other_parameters_choose_among_the_allowed_tokens(self, stack: Stack) -> None:
        for parameters in (
            {"top_k": 1, "do_sample": True, "seed": 1},
            {"top_p": 0.1, "do_sample": True, "seed": 1},
            {"typical_p": 0.5, "do_sample": True, "seed": 1},
            {"repetition_penalty": 5.0, "frequency_penalty": 1.0},
            {"watermark": True, "do_sample": True, "seed": 1},
        ):
            check(generate(stack, BY_SCHEMA, **parameters)["generated_text"])


class TestForcedTokens:
    def test_forced_tokens_have_probability_1(self, stack: Stack) -> None:
        constant = "this text has not a single choice"
        result = generate(stack, {"type": "json", "value": {"const": constant}}, top_n_tokens=2)
        assert json.loads(result["generated_text"]) == constant
        tokens, tops = result["details"]["tokens"], result["details"]["top_tokens"]
        assert len(tokens) > 5
        # Several tokens may spell the beginning: the model chooses the first one.
        assert [token["logprob"] for token in tokens[1:]] == [0.0] * (len(tokens) - 1)
        assert tops[1:] == [[token] for token in tokens[1:]]
        assert tokens[-1]["special"]

    def test_text_has_forced_and_chosen_tokens(self, stack: Stack) -> None:
        tokens = generate(stack, BY_SCHEMA)["details"]["tokens"]
        assert sum(token["logprob"] == 0.0 for token in tokens) >= 10
        assert any(token["logprob"] < 0.0 for token in tokens)

    def test_forced_tokens_stop_at_the_token_limit(self, stack: Stack) -> None:
        whole = generate(stack, BY_SCHEMA)["details"]["tokens"]
        for count in range(1, len(whole)):
            result = generate(stack, BY_SCHEMA, max_new_tokens=count)
            assert result["details"]["tokens"] == whole[:count]
            assert result["details"]["finish_reason"] == "length"
            assert result["details"]["generated_tokens"] == count

    def test_forced_tokens_stop_at_a_stop_sequence(self, stack: Stack) -> None:
        result = generate(stack, BY_SCHEMA, stop=["loud"])
        assert result["generated_text"].endswith("loud")
        assert result["details"]["finish_reason"] == "stop_sequence"
        stack.wait_until_idle()

    def test_forced_tokens_are_counted(self, stack: Stack) -> None:
        name = "tgi_request_generated_tokens_sum"
        before = stack.metric(name)
        count = generate(stack, BY_SCHEMA)["details"]["generated_tokens"]
        assert stack.metric(name) - before == count
