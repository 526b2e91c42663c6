"""A model's outputs follow their grammar, as libraries judge that the engine does not use."""

from __future__ import annotations

import datetime
import json
import re
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from engine.grammar.backend_llguidance import json_source, regex_source
from engine.protocol.request import FinishReason, Request, SamplingParams
from tests.engine.fakes import run, token_ids
from tests.engine.grammar.grammar_cases import (
    BOOLEAN,
    ENDLESS,
    INTEGER,
    NULL,
    REGEXES,
    SCHEMAS,
    Schema,
    array,
    record,
    text,
)
from tests.engine.grammar.grammars import (
    KINDS,
    Outcome,
    demo_engine,
    encode,
    eos_of,
    generate,
    make_request,
    random_engine,
    special_ids,
    spell,
    tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("random", "demo")
NUM_SEEDS = 2
MAX_NEW_TOKENS = 200
ALL_SCHEMAS = {**SCHEMAS, **ENDLESS}
# A few schemas, for tests that need only some.
SMALL = {name: SCHEMAS[name] for name in ("object", "enum of unicode", "uuid", "tree", "number")}
FORMATS = FormatChecker()  # with the formats that need no packages: date, uuid, ipv4, ipv6, email
_DURATION = r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)"


@FORMATS.checks("date", ValueError)
def is_date(value: object) -> bool:
    """RFC 3339, except that the grammar allows 29 February in every year."""
    if isinstance(value, str):
        known = re.sub("^[0-9]{4}", "2000", value)
        return str(datetime.date.fromisoformat(known)) == known
    return True


@FORMATS.checks("time", ValueError)
def is_time(value: object) -> bool:
    """RFC 3339, except that the grammar allows a leap second in every minute."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d\d:\d\d):(\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", value, re.I)
        if match is None or int(match[2]) > 60:
            return False
        offset = match[4].upper().replace("Z", "+00:00")
        datetime.time.fromisoformat(f"{match[1]}:00{offset}")
    return True


@FORMATS.checks("date-time", ValueError)
def is_date_time(value: object) -> bool:
    """A date, a T and a time."""
    if isinstance(value, str):
        return is_date(value[:10]) and value[10:11] in ("T", "t") and is_time(value[11:])
    return True


@FORMATS.checks("duration")
def is_duration(value: object) -> bool:
    """ISO 8601, without fractions."""
    return not isinstance(value, str) or re.fullmatch(_DURATION, value) is not None


@FORMATS.checks("uri", ValueError)
def is_uri(value: object) -> bool:
    """A scheme and ASCII characters."""
    return not isinstance(value, str) or bool(urlsplit(value).scheme and value.isascii())


def request_of(kind: str, name: str, seed: int, **options: Any) -> Request:
    """The request for a schema or a regular expression."""
    source = regex_source(name) if kind == "regex" else json_source(ALL_SCHEMAS[name])
    return make_request(f"{kind} {seed} {name}", source, max_new_tokens=MAX_NEW_TOKENS, **options)


@cache
def outcomes(model: str) -> dict[str, Outcome]:
    """All cases, in one batch."""
    engine = random_engine() if model == "random" else demo_engine(Path("unused"))
    torch.set_num_threads(1)
    requests = [
        request_of(kind, name, seed)
        for kind, names in (("json", ALL_SCHEMAS), ("regex", REGEXES))
        for name in names
        for seed in range(NUM_SEEDS)
    ]
    return generate(engine, *requests)


def check_json(schema: Schema, spelt: bytes) -> None:
    """Asserts that a text is JSON with the usual white space, and an instance of the schema."""
    written = spelt.decode()
    instance = json.loads(written, parse_constant=pytest.fail)
    Draft202012Validator(schema, format_checker=FORMATS).validate(instance)
    bare = re.sub(r'"(\\.|[^"\\])*"', "", written)
    assert not re.search(r"\s", re.sub("[,:] ", "", bare)), "no other white space"
    assert not re.search("[,:](?! )", bare), "one space after each comma and colon"


def check_regex(pattern: str, spelt: bytes) -> None:
    """Asserts that the whole text matches."""
    assert regex.fullmatch(pattern, spelt.decode()), spelt.decode()


@pytest.mark.parametrize("name", ALL_SCHEMAS)
@pytest.mark.parametrize("model", MODELS)
def test_finished_json_is_an_instance_of_its_schema(model: str, name: str) -> None:
    Draft202012Validator.check_schema(ALL_SCHEMAS[name])
    for seed in range(NUM_SEEDS):
        outcome = outcomes(model)[f"json {seed} {name}"]
        assert outcome.error is None
        if outcome.finished:
            check_json(ALL_SCHEMAS[name], spell(outcome.tokens))
        else:
            assert outcome.reason is FinishReason.LENGTH
            assert len(outcome.tokens) == MAX_NEW_TOKENS
            spell(outcome.tokens)  # raises for special tokens


@pytest.mark.parametrize("pattern", REGEXES)
@pytest.mark.parametrize("model", MODELS)
def test_finished_text_matches_its_regular_expression(model: str, pattern: str) -> None:
    for seed in range(NUM_SEEDS):
        outcome = outcomes(model)[f"regex {seed} {pattern}"]
        assert outcome.error is None
        if outcome.finished:
            check_regex(pattern, spell(outcome.tokens))
        else:
            assert outcome.reason is FinishReason.LENGTH
            assert len(outcome.tokens) == MAX_NEW_TOKENS
            begun = spell(outcome.tokens).decode(errors="ignore")
            assert regex.fullmatch(pattern, begun, partial=True)


@pytest.mark.parametrize("model", MODELS)
def test_most_outputs_finish(model: str) -> None:
    finished = [name for name, outcome in outcomes(model).items() if outcome.finished]
    assert len(finished) > 0.85 * len(outcomes(model))
    assert not outcomes(model)["json 0 a long string"].finished
    assert len({bytes(spell(outcomes(model)[name].tokens)) for name in finished}) > 120


def test_an_end_token_at_max_new_tokens_counts_as_length() -> None:
    source = json_source({"const": "abc"})
    length = len(encode('"abc"'))
    requests = [make_request(str(n), source, max_new_tokens=n) for n in range(1, length + 3)]
    for name, outcome in generate(random_engine(), *requests).items():
        if int(name) <= length + 1:  # as in TGI, see Sequence.append
            assert outcome.reason is FinishReason.LENGTH
            assert [*encode('"abc"'), *eos_of("demo")][: int(name)] == outcome.tokens
        else:
            assert outcome.finished


def test_forced_tokens_come_in_the_same_step_with_probability_1() -> None:
    request = make_request(
        "r",
        json_source(record({"name": {"const": "x"}, "ok": BOOLEAN})),
        sampling=SamplingParams(top_n_tokens=2),
    )
    engine = random_engine()
    outputs = run(engine, request)["r"]
    assert engine.stats().num_steps < len(outputs)
    assert engine.stats().num_generated_tokens == len(outputs)
    assert [output.is_last for output in outputs] == [False] * (len(outputs) - 1) + [True]
    tokens = [output.token for output in outputs if output.token is not None]
    assert tokens[1].logprob == 0.0
    assert tokens[1].top == ((tokens[1].token_id, 0.0),)
    check_json(json.loads('{"required": ["name", "ok"]}'), spell(token_ids(outputs)[:-1]))


def few() -> list[tuple[str, str]]:
    """Some cases of each kind."""
    return [("json", name) for name in SMALL] + [
        ("regex", r"\w{1,6}"),
        ("regex", r"\S{1,4}\s\S{1,4}"),
    ]


@pytest.mark.parametrize(("kind", "name"), few())
def test_same_seed_gives_the_same_tokens_alone(kind: str, name: str) -> None:
    request = request_of(kind, name, 0)
    assert generate(random_engine(), request) == {
        request.request_id: outcomes("random")[request.request_id]
    }


def test_same_seed_gives_the_same_tokens_after_preemption() -> None:
    long = [name for name, outcome in outcomes("random").items() if len(outcome.tokens) > 45]
    cases = [name.split(" ", 2) for name in long]
    requests = [request_of(kind, name, int(seed)) for kind, seed, name in cases]
    engine = random_engine(num_blocks=24)
    results = generate(engine, *requests)
    assert engine.stats().num_preemptions > 5
    assert results == {name: outcomes("random")[name] for name in results}


def test_resumed_requests_continue_with_the_same_tokens() -> None:
    requests, expected = [], {}
    for kind, name in few():
        whole = outcomes("random")[f"{kind} 0 {name}"]
        for length in range(0, min(len(whole.tokens), 40), 3):
            request_id = f"{kind} {name} {length}"
            options = {"resumed_token_ids": tuple(whole.tokens[:length])}
            seed = request_of(kind, name, 0).sampling
            requests.append(
                make_request(
                    request_id, request_of(kind, name, 0).grammar, sampling=seed, **options
                )
            )
            expected[request_id] = whole._replace(tokens=whole.tokens[length:])
    assert generate(random_engine(), *requests) == expected


def test_rows_without_a_grammar_are_not_affected() -> None:
    free = [
        make_request(f"free {index}", "", max_new_tokens=20, prompt_token_ids=(50 + index, 9))
        for index in range(6)
    ]
    alone = run(random_engine(), *free)
    bound = [request_of("json", name, 0) for name in SMALL]
    together = run(random_engine(), *bound[:2], *free, *bound[2:])
    for request in free:
        name = request.request_id
        assert token_ids(together[name]) == token_ids(alone[name])
        logprobs = [
            [output.token.logprob for output in outputs[name] if output.token is not None]
            for outputs in (alone, together)
        ]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)


def test_a_grammar_that_fails_ends_its_own_request_only() -> None:
    names = ("ab|[^\\s\\S]", r"a[^\s\S]", "(", "([a-z]{1,100}){1,100}")
    results = generate(
        random_engine(),
        *(make_request(f"bad {index}", regex_source(name)) for index, name in enumerate(names)),
        make_request("forbidden", regex_source("ab"), resumed_token_ids=tuple(encode("x"))),
        *(request_of("json", name, 0) for name in SMALL),
    )
    for name in ("bad 1", "bad 2", "bad 3", "forbidden"):
        assert results[name].reason is None
        assert (results[name].error or "").startswith("grammar: ")
    assert spell(results["bad 0"].tokens) == b"ab"
    for name in SMALL:
        assert results[f"json 0 {name}"] == outcomes("random")[f"json 0 {name}"]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_calls_or_text(kind: str) -> None:
    schema = record({"name": {"const": "now"}, "arguments": record({"x": INTEGER})})
    source = json_source(schema, or_text=True)
    begun = [tuple(encode(beginning, kind)) for beginning in ("{", '{"', "", "", "Hi", " ", "[")]
    requests = [
        make_request(f"{index}", source, kind, resumed_token_ids=beginning, max_new_tokens=60)
        for index, beginning in enumerate(begun)
    ]
    results = generate(random_engine(kind), *requests)
    for index, beginning in enumerate(begun):
        outcome = results[str(index)]
        assert outcome.error is None
        spelt = spell(beginning, kind) + spell(outcome.tokens, kind)
        if spelt.startswith(b"{"):
            assert outcome.finished
            check_json(schema, spelt)
        else:
            assert not spelt.lstrip().startswith(b"{")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_outputs_of_tokenizers_with_a_byte_fallback_match(kind: str) -> None:
    names = [*list(SCHEMAS)[:60:2], "enum of unicode", "object with unicode names"]
    patterns = [*REGEXES[16:20], "[😀-😏]{1,3}", " the{1,2} ?tr", "(👍🏽|🇩🇪|é){1,3}", " {0,3}x  "]
    schemas = {**{name: SCHEMAS[name] for name in names}, "emoji": {"const": " 👍🏽  the\n🇩🇪"}}
    requests = [make_request(f"j{name}", json_source(s), kind) for name, s in schemas.items()]
    requests += [make_request(f"r{pattern}", regex_source(pattern), kind) for pattern in patterns]
    results = generate(random_engine(kind), *requests)
    assert sum(outcome.finished for outcome in results.values()) > 0.85 * len(results)
    begun = encode("x", kind)
    for name, outcome in results.items():
        assert outcome.error is None
        if not outcome.finished:
            assert outcome.reason is FinishReason.LENGTH
            continue
        spelt = spell(outcome.tokens, kind)
        decoded = tokenizer(kind).decode([*begun, *outcome.tokens], skip_special_tokens=True)
        assert decoded == "x" + spelt.decode()
        if name.startswith("j"):
            check_json(schemas[name[1:]], spelt)
        else:
            check_regex(name[1:], spelt)


def test_a_text_may_spell_a_special_token() -> None:
    for kind in KINDS:
        for name in ("<|end|>", "<|user|>", "</s>", "<unk>"):
            schema = record({"a": {"const": f"x{name}"}, "b": BOOLEAN})
            (outcome,) = generate(
                random_engine(kind), make_request("r", json_source(schema), kind)
            ).values()
            assert outcome.finished
            assert special_ids(kind).isdisjoint(outcome.tokens)
            check_json(schema, spell(outcome.tokens, kind))


_names = st.text(st.sampled_from('abé日😀"\\ \n'), min_size=1, max_size=4)
_constants = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), _names)
_leaves = st.one_of(
    st.sampled_from([BOOLEAN, NULL, {"type": "string", "format": "date"}]),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-2000, 2000),
        st.integers(0, 3000),
    ),
    st.builds(lambda least, span: text(least + span, minLength=least), *[st.integers(0, 3)] * 2),
    st.builds(lambda value: {"const": value}, _constants),
    st.builds(lambda values: {"enum": values}, st.lists(_constants, min_size=1, unique_by=repr)),
)


def _inner(schemas: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    properties = st.dictionaries(_names, schemas, max_size=3)
    return st.one_of(
        st.builds(
            lambda required, optional: record(
                required, {name: s for name, s in optional.items() if name not in required}
            ),
            properties,
            properties,
        ),
        st.builds(
            lambda items, least, span: array(items, least, least + span),
            schemas,
            *[st.integers(0, 2)] * 2,
        ),
        st.builds(lambda some: {"anyOf": some}, st.lists(schemas, min_size=1, max_size=3)),
    )


_schemas = st.recursive(_leaves, _inner, max_leaves=8)
_shared_engine = cache(random_engine)
_numbers = count()


@given(st.lists(_schemas, min_size=4, max_size=8))
@settings(max_examples=20)
def test_outputs_match_random_schemas(schemas: list[Schema]) -> None:
    made = {f"{next(_numbers)}": schema for schema in schemas}
    requests = [make_request(name, json_source(schema)) for name, schema in made.items()]
    for name, outcome in generate(_shared_engine(), *requests).items():
        assert outcome.error is None
        if outcome.finished:
            check_json(made[name], spell(outcome.tokens))
        else:
            assert outcome.reason is FinishReason.LENGTH
