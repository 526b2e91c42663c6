"""Texts that a grammar constrains, over both transports, and grammars that are meant to hurt."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import jsonschema
import pytest

from tests.e2e.contract import events
from tests.e2e.reflection_client import ReflectionClient, as_dict, details
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, Stack, running
from tests.e2e.tools import TOOLS

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["cat", "crow", "cow"]},
        "is_loud": {"type": "boolean"},
        "number_of_legs": {"type": "integer", "minimum": 2, "maximum": 4},
    },
    "required": ["animal", "is_loud", "number_of_legs"],
    "additionalProperties": False,
}
# As text, since protobuf's objects have no order and texts follow their schema's.
BY_SCHEMA = {"type": "json", "value": json.dumps(SCHEMA)}
DATE = {"type": "regex", "value": "[0-9]{4}-[01][0-9]-[0-3][0-9]"}
UNENFORCEABLE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
RANDOM = {"do_sample": True, "temperature": 1e6}  # any token that is allowed, whatever the model
MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 60, "temperature": 0.0}


def generate(stack: Stack, grammar: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return stack.generate(grammar=grammar, **{"max_new_tokens": 60, **parameters})


def check(text: str, schema: dict[str, Any] = SCHEMA) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def ids(tokens: list[dict[str, Any]]) -> list[int]:
    return [token["id"] for token in tokens]


class TestGenerate:
    def test_matches_a_regular_expression(self, stack: Stack) -> None:
        for seed in range(5):
            result = generate(stack, DATE, **RANDOM, seed=seed)
            assert re.fullmatch(DATE["value"], result["generated_text"])
            assert result["details"]["finish_reason"] == "eos_token"

    @pytest.mark.parametrize("kind", ["json", "json_object"])
    @pytest.mark.parametrize("value", [SCHEMA, json.dumps(SCHEMA)], ids=["object", "text"])
    def test_fits_a_schema(self, stack: Stack, kind: str, value: Any) -> None:
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
    def test_fits_schemas_of_all_kinds(self, stack: Stack, schema: dict[str, Any]) -> None:
        for seed in range(3):
            grammar = {"type": "json", "value": json.dumps(schema)}
            result = generate(stack, grammar, **RANDOM, seed=seed, max_new_tokens=300)
            if result["details"]["finish_reason"] == "eos_token":  # a number may be long
                check(result["generated_text"], schema)

    @pytest.mark.parametrize("grammar", [DATE, BY_SCHEMA], ids=["regex", "json"])
    def test_is_the_same_over_grpc(
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

    def test_takes_an_object_over_grpc(self, api: ReflectionClient) -> None:
        parameters = {"grammar": {"type": "json", "value": SCHEMA}, "max_new_tokens": 60}
        reply = api.call("Generate", {"inputs": PROMPT, "parameters": parameters})
        check(reply.generated_text)

    def test_streams_the_same(self, stack: Stack, api: ReflectionClient) -> None:
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

    def test_a_prompt_that_is_echoed_is_not_part_of_it(self, stack: Stack) -> None:
        result = generate(stack, DATE, return_full_text=True, decoder_input_details=True)
        assert re.fullmatch(re.escape(PROMPT) + DATE["value"], result["generated_text"])
        assert len(result["details"]["prefill"]) > 1

    def test_other_parameters_choose_among_what_is_allowed(self, stack: Stack) -> None:
        for parameters in (
            {"top_k": 1, "do_sample": True, "seed": 1},
            {"top_p": 0.1, "do_sample": True, "seed": 1},
            {"typical_p": 0.5, "do_sample": True, "seed": 1},
            {"repetition_penalty": 5.0, "frequency_penalty": 1.0},
            {"watermark": True, "do_sample": True, "seed": 1},
        ):
            check(generate(stack, BY_SCHEMA, **parameters)["generated_text"])


class TestForcedTokens:
    def test_have_the_probability_1(self, stack: Stack) -> None:
        constant = "this text has not a single choice"
        result = generate(stack, {"type": "json", "value": {"const": constant}}, top_n_tokens=2)
        assert json.loads(result["generated_text"]) == constant
        tokens, tops = result["details"]["tokens"], result["details"]["top_tokens"]
        assert len(tokens) > 5
        # How the first token spells the beginning may still be the model's choice.
        assert [token["logprob"] for token in tokens[1:]] == [0.0] * (len(tokens) - 1)
        assert tops[1:] == [[token] for token in tokens[1:]]
        assert tokens[-1]["special"]

    def test_stand_beside_choices(self, stack: Stack) -> None:
        tokens = generate(stack, BY_SCHEMA)["details"]["tokens"]
        assert sum(token["logprob"] == 0.0 for token in tokens) >= 10
        assert any(token["logprob"] < 0.0 for token in tokens)

    def test_end_where_the_text_must(self, stack: Stack) -> None:
        whole = generate(stack, BY_SCHEMA)["details"]["tokens"]
        for count in range(1, len(whole)):
            result = generate(stack, BY_SCHEMA, max_new_tokens=count)
            assert result["details"]["tokens"] == whole[:count]
            assert result["details"]["finish_reason"] == "length"
            assert result["details"]["generated_tokens"] == count

    def test_end_at_a_stop_sequence(self, stack: Stack) -> None:
        result = generate(stack, BY_SCHEMA, stop=["loud"])
        assert result["generated_text"].endswith("loud")
        assert result["details"]["finish_reason"] == "stop_sequence"
        stack.wait_until_idle()

    def test_are_counted(self, stack: Stack) -> None:
        name = "tgi_request_generated_tokens_sum"
        before = stack.metric(name)
        count = generate(stack, BY_SCHEMA)["details"]["generated_tokens"]
        assert stack.metric(name) - before == count


class TestResponseFormat:
    @pytest.mark.parametrize(
        "wanted",
        [
            {"type": "json", "value": json.dumps(SCHEMA)},
            {"type": "json_object", "value": json.dumps(SCHEMA)},
            {"type": "json_schema", "json_schema": {"schema": json.dumps(SCHEMA)}},
        ],
    )
    def test_is_a_schema_as_text(self, stack: Stack, api: ReflectionClient, wanted: Any) -> None:
        text = chat(stack, api, wanted)
        check(text)
        assert text == chat(stack, api, BY_SCHEMA)

    @pytest.mark.parametrize(
        "wanted",
        [
            {"type": "json", "value": SCHEMA},
            {"type": "json_object", "value": SCHEMA},
            {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}},
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "animal",
                    "description": "one of three",
                    "strict": True,
                    "schema": SCHEMA,
                },
            },
        ],
    )
    def test_is_a_schema(self, stack: Stack, api: ReflectionClient, wanted: Any) -> None:
        text = rest_chat(stack, {**CHAT, "response_format": wanted})
        assert text == rest_chat(stack, {**CHAT, "response_format": BY_SCHEMA})
        (typed,) = api.collect("Chat", {**CHAT, "response_format": wanted})
        check(typed.completion.choices[0].message.content)

    def test_is_any_object(self, stack: Stack, api: ReflectionClient) -> None:
        assert chat(stack, api, {"type": "json_object"}).startswith("{")

    def test_is_a_regular_expression(self, stack: Stack, api: ReflectionClient) -> None:
        assert re.fullmatch(DATE["value"], chat(stack, api, DATE))

    def test_is_text(self, stack: Stack, api: ReflectionClient) -> None:
        assert chat(stack, api, {"type": "text"}) == chat(stack, api, None)

    @pytest.mark.parametrize(
        ("wanted", "said"),
        [
            ({"type": "json"}, "missing field `value`"),
            ({"type": "regex"}, "missing field `value`"),
            ({"type": "json_schema"}, "missing field `value`"),
            ({"type": "json_schema", "json_schema": {"name": "a"}}, "missing field `value`"),
            ({"value": "a"}, "missing field `type`"),
            ({"type": "json", "value": UNENFORCEABLE}, "uniqueItems"),
            ({"type": "json_schema", "json_schema": {"schema": UNENFORCEABLE}}, "uniqueItems"),
        ],
    )
    def test_that_cannot_be_had_is_refused(
        self, stack: Stack, api: ReflectionClient, wanted: Any, said: str
    ) -> None:
        body = {**CHAT, "response_format": wanted}
        field = refused(stack, api, "/v1/chat/completions", "Chat", body, said)
        assert field.partition(".")[0] == "response_format"


def chat(stack: Stack, api: ReflectionClient, wanted: Any) -> str:
    """The answer in a format, which is the same over both transports and in streams."""
    body = {**CHAT, "response_format": wanted} if wanted is not None else CHAT
    text = rest_chat(stack, body)
    (typed,) = api.collect("Chat", body)
    assert typed.completion.choices[0].message.content == text
    streamed = events(stack.http.post("/v1/chat/completions", json={**body, "stream": True}))
    deltas = [json.loads(item)["choices"][0]["delta"] for item in streamed[:-1]]
    assert "".join(delta["content"] for delta in deltas) == text
    return text


def rest_chat(stack: Stack, body: dict[str, Any]) -> str:
    reply = stack.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return str(choice["message"]["content"])


def refused(
    stack: Stack, api: ReflectionClient, path: str, method: str, body: dict[str, Any], said: str
) -> str:
    """The field that a refusal names, which is the same 422 over both transports."""
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 422, reply.text
    error = reply.json()
    assert error["error_type"] == "validation"
    assert said in error["error"]
    with pytest.raises(grpc.RpcError) as failed:
        result = api.call(method, body)
        if method == "Chat":
            list(result)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failed.value.details() == error["error"]
    reason, field = details(failed.value)
    assert reason == "validation"
    assert field is not None
    return field


class TestRefused:
    @pytest.mark.parametrize(
        ("grammar", "said", "field"),
        [
            ({"type": "json", "value": UNENFORCEABLE}, "uniqueItems", ""),
            ({"type": "json", "value": {"type": "string", "format": "klingon"}}, "klingon", ""),
            ({"type": "json", "value": {"not": {}}}, "", ""),
            ({"type": "json", "value": "{"}, "grammar is not valid: ", ""),
            ({"type": "json", "value": "[]"}, "it is not an object", ""),
            ({"type": "json", "value": [1]}, "grammar is not supported", ""),
            ({"type": "json", "value": {"maximum": 1e300}}, "more than 64 bits", ""),
            ({"type": "regex", "value": "["}, "regex", ""),
            ({"type": "regex", "value": 5}, "expected a string", ""),
            ({"type": "regex"}, "missing field `value`", ".value"),
            ({"value": "a"}, "missing field `type`", ".type"),
        ],
    )
    def test_grammar_is_a_422_that_names_it(
        self, stack: Stack, api: ReflectionClient, grammar: Any, said: str, field: str
    ) -> None:
        body = {"inputs": PROMPT, "parameters": {"grammar": grammar}}
        named = refused(stack, api, "/generate", "Generate", body, said)
        assert named == f"parameters.grammar{field}"

    def test_grammar_ends_a_stream_with_an_error(self, stack: Stack, api: ReflectionClient) -> None:
        grammar = {"type": "json", "value": UNENFORCEABLE}
        body = {"inputs": PROMPT, "parameters": {"grammar": grammar}}
        (event,) = events(stack.http.post("/generate_stream", json=body))
        assert json.loads(event)["error_type"] == "validation"
        with pytest.raises(grpc.RpcError, match="uniqueItems"):
            api.collect("GenerateStream", body)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log_path = tmp_path_factory.mktemp("without") / "log"
    with running(log_path, "--disable-grammar-support") as stack:
        yield stack


class TestWithoutGrammars:
    @pytest.mark.parametrize(
        ("path", "method", "body"),
        [
            ("/generate", "Generate", {"inputs": PROMPT, "parameters": {"grammar": DATE}}),
            ("/v1/chat/completions", "Chat", {**CHAT, "response_format": BY_SCHEMA}),
            ("/v1/chat/completions", "Chat", {**CHAT, "tools": TOOLS}),
            ("/v1/chat/completions", "Chat", {**CHAT, "tools": TOOLS, "tool_choice": "required"}),
        ],
    )
    def test_nothing_needs_one(
        self, without: Stack, path: str, method: str, body: dict[str, Any]
    ) -> None:
        api = ReflectionClient(without.through_envoy)
        refused(without, api, path, method, body, "grammar is not supported")

    def test_the_rest_works(self, without: Stack) -> None:
        assert without.generate()["generated_text"]
        for more in (
            {"response_format": {"type": "text"}},
            {"tools": TOOLS, "tool_choice": "none"},
        ):
            reply = without.http.post("/v1/chat/completions", json={**CHAT, **more})
            assert reply.status_code == 200


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"x": value}}
    return value


WIDE = {f"k{i}": {"enum": [f"v{i}_{j}" for j in range(20)]} for i in range(1200)}
POISON: list[dict[str, Any]] = [
    # Slow to compile, and memory grows meanwhile.
    {"type": "json", "value": {"type": "integer", "multipleOf": 9999991}},
    {"type": "json", "value": {"type": "integer", "multipleOf": 9999973}},
    {"type": "json", "value": {"type": "array", "items": {"multipleOf": 9999971}}},
    # Huge masks.
    {"type": "regex", "value": "a{100000}"},
    {"type": "regex", "value": "a{150000}"},
    {"type": "json", "value": {"type": "object", "properties": WIDE}},
    # Huge, deep, or nothing at all.
    {"type": "regex", "value": "a" * 300_000},
    {"type": "json", "value": json.dumps(nested(100))},
    {"type": "json", "value": {"maximum": 1e300}},
    {"type": "json", "value": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"type": "regex", "value": "((((((["},
]
UNTRIED = (6, 7)  # too large or too deep, which is seen at once
STATUSES = {grpc.StatusCode.INVALID_ARGUMENT: 422, grpc.StatusCode.RESOURCE_EXHAUSTED: 429}
NUM_STREAMS = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One that has room for all the streams, and soon loses its patience with a grammar."""
    flags = ("--grammar-deadline-seconds=1", "--max-batch-total-tokens=70000")
    with running(tmp_path_factory.mktemp("poison") / "log", *flags) as stack:
        yield stack


class TestPoison:
    """A grammar costs nobody but its sender."""

    def test_does_not_disturb_what_runs(self, server: Stack) -> None:
        api = ReflectionClient(server.through_envoy)
        over = threading.Event()
        healthy = {name: server.child(name).pid for name in ("engine", "service", "envoy")}

        def stream(number: int) -> tuple[list[int], str | None]:
            """Half of them run to their end, the others leave when the poison is over."""
            leaves = number % 2 == 0
            parameters = {**ENDLESS, "max_new_tokens": 2000 if leaves else 500, "details": True}
            body = {"inputs": PROMPT, "parameters": parameters}
            found: list[int] = []
            with server.http.stream("POST", "/generate_stream", json=body) as reply:
                for line in reply.iter_lines():
                    if not line:
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    found.append(event["token"]["id"])
                    if event["details"] is not None:
                        return found, str(event["details"]["finish_reason"])
                    if leaves and over.is_set():
                        return found, None
            raise AssertionError("a stream without its end")

        def send(number: int, grammar: dict[str, Any]) -> tuple[int, str]:
            body = {"inputs": PROMPT, "parameters": {"grammar": grammar}}
            if number % 2:
                with pytest.raises(grpc.RpcError) as failed:
                    api.call("Generate", body)
                return STATUSES[failed.value.code()], str(failed.value.details())
            reply = server.http.post("/generate", json=body)
            return reply.status_code, reply.text

        api.describe()  # before threads share it
        server.http = _with_connections(server, NUM_STREAMS + len(POISON))
        alone = server.generate(**{**ENDLESS, "max_new_tokens": 500})["details"]["tokens"]
        with ThreadPoolExecutor(NUM_STREAMS + len(POISON)) as pool:
            streams = [pool.submit(stream, number) for number in range(NUM_STREAMS)]
            try:
                server.wait_until_running(NUM_STREAMS)
                sent = [pool.submit(send, *item) for item in enumerate(POISON)]
                answers = [item.result() for item in sent]
                assert generate(server, BY_SCHEMA)["details"]["finish_reason"] == "eos_token"
            finally:
                over.set()
            results = [item.result() for item in streams]
        # Too much work under a machine's full load is put off instead of blamed on the grammar.
        assert {status for status, _ in answers} <= set(STATUSES.values()), answers
        assert [answers[number][0] for number in UNTRIED] == [422] * len(UNTRIED), answers
        for number, (found, reason) in enumerate(results):
            assert reason == ("length" if number % 2 else None) or len(found) == 2000
            size = min(len(found), len(alone))
            assert found[:size] == ids(alone)[:size]
        server.wait_until_idle()
        assert server.is_healthy()
        assert {name: server.child(name).pid for name in healthy} == healthy

    def test_that_passes_the_check_costs_its_sender_only(self, server: Stack) -> None:
        # What a text runs into depends on its tokens, so that no trial finds everything.
        grammar = {"type": "regex", "value": "(((a{1,300}){1,300}){1,300})"}
        body = {"inputs": PROMPT, "parameters": {"grammar": grammar, "max_new_tokens": 50}}
        reply = server.http.post("/generate", json=body)
        assert reply.status_code in (200, 422, 424)
        check(generate(server, BY_SCHEMA)["generated_text"])


def _with_connections(server: Stack, count: int) -> httpx.Client:
    """A client that so many threads can use at a time."""
    server.http.close()
    limits = httpx.Limits(max_connections=count + 10)
    return httpx.Client(base_url=server.url, timeout=DEADLINE_S, limits=limits)
