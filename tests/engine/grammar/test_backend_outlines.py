"""The second library gives the same texts as the first, or refuses; neither knows the other."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import pytest
import regex
from jsonschema import Draft202012Validator

from engine.grammar import backend_llguidance as llguidance
from engine.grammar import backend_outlines as outlines
from engine.grammar.compiler import GrammarCompiler
from engine.protocol.errors import GrammarError
from tests.engine.grammar.grammar_cases import ENDLESS, INTEGER, NULL, REGEXES, SCHEMAS, Schema
from tests.engine.grammar.grammars import (
    KINDS,
    accepts,
    allowed,
    compile_source,
    compiler,
    encode,
    eos_of,
    generate,
    make_request,
    random_engine,
    spell,
    walk,
)

ALL_SCHEMAS = {**SCHEMAS, **ENDLESS}
del ALL_SCHEMAS["a long string"]  # its index has 5,000 states, and takes minutes
# Of the schemas that the first library enforces; all others are refused by name.
ENFORCED = {
    "boolean",
    "null",
    "integer",
    "number",
    "string of a length",
    "enum",
    "enum of unicode",
    "const",
    "array of a size",
    "array of arrays",
    "any string",
}
MORE: dict[str, Schema] = {
    "person": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 2}, "age": {"type": "integer"}},
        "required": ["name"],
    },
    "late requirement": {
        "type": "object",
        "properties": {"a": NULL, "b": {"type": "boolean"}, "c": NULL},
        "required": ["c"],
        "additionalProperties": False,
    },
    "unicode names": {
        "type": "object",
        "properties": {"é": NULL, "a.b*": NULL, " ": NULL},
        "required": ["é", "a.b*", " "],
    },
    "array of two or three": {"type": "array", "items": NULL, "minItems": 2, "maxItems": 3},
    "array of at most one": {"type": "array", "items": NULL, "maxItems": 1},
    "empty array": {"type": "array", "items": NULL, "maxItems": 0},
    "array of at least two": {"type": "array", "items": NULL, "minItems": 2},
    "const": {"const": 'a+b (c) [d] \\ "e" .*'},
    "annotations": {"type": "null", "title": "x", "$comment": "y", "default": 1, "examples": [2]},
    "enum with numbers": {"enum": [-7, 2**53 + 1, 2**63 - 1, -(2**63), True, None, "7"]},
    "anyOf": {"anyOf": [{"type": "boolean"}, NULL, {"enum": ["a", "b"], "type": "string"}]},
    "reference": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"$ref": "#/$defs/a"}},
        "required": ["a", "b"],
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 2}, "b": NULL},
    },
}


def is_valid(text: str, schema: Schema) -> bool:
    try:
        Draft202012Validator(schema).validate(json.loads(text))
    except Exception:
        return False
    return True


class TestRegexes:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("pattern", REGEXES)
    def test_allows_what_the_other_library_allows(self, pattern: str, kind: str) -> None:
        try:
            compile_source(outlines.regex_source(pattern), kind)
        except GrammarError as error:
            assert regex.fullmatch(pattern, "") or "assertion" in str(error), error  # noqa: PT017
            return
        for seed in range(3):
            for source in (outlines.regex_source(pattern), llguidance.regex_source(pattern)):
                text = spell(walk(compile_source(source, kind), seed, kind), kind)
                if len(text) < 60:
                    assert regex.fullmatch(pattern, text.decode())
                    if not re.search("<.*>", text.decode()):  # else the tokenizer sees its own name
                        matcher = compile_source(outlines.regex_source(pattern), kind)
                        assert accepts(matcher, text.decode(), kind), text

    @pytest.mark.parametrize("pattern", [p for p in REGEXES[:14] if not regex.fullmatch(p, "")])
    def test_allows_the_end_exactly_where_the_text_matches(self, pattern: str) -> None:
        for seed in range(3):
            tokens = walk(compile_source(outlines.regex_source(pattern)), seed)
            matcher = compile_source(outlines.regex_source(pattern))
            for index in range(len(tokens) + 1):
                spelt = spell(tokens[:index])
                text = spelt.decode(errors="replace")
                whole = text.encode() == spelt and regex.fullmatch(pattern, text)
                assert (eos_of("demo") <= allowed(matcher)) == bool(whole), text
                assert matcher.is_over <= bool(whole)
                matcher.advance(tokens[index : index + 1])

    @pytest.mark.parametrize(
        ("pattern", "right", "wrong"),
        [
            (r"[a-z]+(?-u:\b)[-a-z]{2}", "ab-c", "abcd"),
            (r"a(?m:$)\nb", "a\nb", "a b"),
        ],
    )
    def test_enforces_assertions_that_the_other_library_lacks(
        self, pattern: str, right: str, wrong: str
    ) -> None:
        with pytest.raises(GrammarError, match="lookarounds"):
            compile_source(llguidance.regex_source(pattern))
        assert accepts(compile_source(outlines.regex_source(pattern)), right)
        assert not accepts(compile_source(outlines.regex_source(pattern)), wrong)

    @pytest.mark.parametrize("pattern", ["(", "a{2,1}", r"(a)\1", "(?=a)b", "a*", "", r"\bx"])
    def test_refuses_what_it_cannot_enforce(self, pattern: str) -> None:
        with pytest.raises(GrammarError):
            compile_source(outlines.regex_source(pattern))


class TestSchemas:
    @pytest.mark.parametrize("name", ALL_SCHEMAS)
    def test_a_schema_is_refused_unless_all_of_it_is_enforced(self, name: str) -> None:
        schema = ALL_SCHEMAS[name]
        if name not in ENFORCED:
            with pytest.raises(GrammarError, match=r"outlines-core .*(at #|#/)"):
                outlines.json_source(schema)
            return
        assert_enforced(schema)

    @pytest.mark.parametrize("name", MORE)
    def test_a_schema_of_plain_keywords_is_enforced(self, name: str) -> None:
        assert_enforced(MORE[name])

    @pytest.mark.parametrize("key", ["pattern", "format", "minimum", "not", "uniqueItems", "x-y"])
    @pytest.mark.parametrize("place", ["#", "#/properties/a", "#/properties/b/items"])
    def test_names_a_keyword_that_would_be_ignored(self, key: str, place: str) -> None:
        inner: Schema = {"type": "array", "items": dict(INTEGER_OF_ANY_SIZE)}
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {"a": dict(INTEGER_OF_ANY_SIZE), "b": inner},
        }
        outlines.json_source(schema)
        target = schema
        for part in place.split("/")[1:]:
            target = target[part]
        target[key] = 1
        with pytest.raises(GrammarError, match=f"`{key}` at {place}/{key}"):
            outlines.json_source(schema)

    @pytest.mark.parametrize("kind", ["integer", "number"])
    def test_bounds_the_digits_of_numbers(self, kind: str) -> None:
        source = outlines.json_source({"type": kind})
        assert accepts(compile_source(source), "-" + "9" * 18)
        assert not accepts(compile_source(source), "9" * 19)
        for seed in range(10):
            json.loads(spell(walk(compile_source(source), seed)))
        text = "[1-9][0-9]*"
        assert accepts(compile_source(outlines.json_source({"const": text})), json.dumps(text))

    def test_refuses_a_schema_that_contains_itself(self) -> None:
        tree: Schema = {"type": "array", "items": {"$ref": "#/$defs/t"}}
        with pytest.raises(GrammarError, match="a schema in itself"):
            outlines.json_source({"$ref": "#/$defs/t", "$defs": {"t": tree}})


INTEGER_OF_ANY_SIZE: Schema = {"type": "integer"}


def assert_enforced(schema: Schema) -> None:
    """Its texts are valid, and those of the other library are among them."""
    source = outlines.json_source(schema)
    for seed in range(4):
        tokens = walk(compile_source(source), seed)
        if len(tokens) < 60:
            assert is_valid(spell(tokens).decode(), schema), spell(tokens)
    if schema.get("type") == "number":
        return  # the other library also writes exponents without a sign
    with suppress(GrammarError):  # which the other library may raise
        for seed in range(4):
            text = spell(walk(compile_source(llguidance.json_source(schema)), seed)).decode()
            if is_valid(text, schema):
                assert accepts(compile_source(source), text), text


class TestMatcher:
    def test_copies_are_independent(self) -> None:
        matcher = compile_source(outlines.regex_source("ab|ac"))
        matcher.advance(encode("a"))
        left, right = matcher.copy(), matcher.copy()
        left.advance(encode("b"))
        right.advance(encode("c"))
        assert left.is_over
        assert right.is_over
        assert not matcher.is_over

    def test_keeps_raising_after_a_forbidden_token(self) -> None:
        for wrong in (encode("x"), [1 << 20], [1 << 40], sorted(eos_of("demo"))):
            matcher = compile_source(outlines.regex_source("abc"))
            with pytest.raises(GrammarError):
                matcher.advance(wrong)
            for again in (matcher.check, matcher.copy, matcher.forced):
                with pytest.raises(GrammarError):
                    again()

    def test_takes_the_end_once(self) -> None:
        matcher = compile_source(outlines.regex_source("a|ab"))
        matcher.advance([*encode("a"), *eos_of("demo")])
        assert matcher.is_over
        with pytest.raises(GrammarError):
            matcher.advance(encode("b"))

    @pytest.mark.parametrize("kind", KINDS)
    def test_spells_names_of_special_tokens_as_text(self, kind: str) -> None:
        for name in ("<|end|>", "</s>", "<unk>"):
            source = outlines.json_source({"const": f"a{name}b"})
            assert (
                spell(walk(compile_source(source, kind), 0, kind), kind) == f'"a{name}b"'.encode()
            )


def test_both_libraries_serve_one_batch() -> None:
    engine = random_engine()
    sources = {
        "first": llguidance.json_source(INTEGER),
        "second": outlines.regex_source("(red|green|blue)+-[0-9]{3}"),
        "third": outlines.json_source(MORE["person"]),
        "none": "",
    }
    requests = [make_request(name, source) for name, source in sources.items()]
    outcomes = generate(engine, *requests)
    assert -999 <= int(spell(outcomes["first"].tokens)) <= 999
    text = spell(outcomes["second"].tokens).decode()
    assert regex.fullmatch("(red|green|blue)+-[0-9]{3}", text, partial=True)
    if outcomes["third"].finished:
        assert is_valid(spell(outcomes["third"].tokens).decode(), MORE["person"])
    assert all(outcome.error is None for outcome in outcomes.values())


class TestCompiler:
    def test_says_that_the_library_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = outlines.regex_source("abc")
        monkeypatch.setattr(outlines, "outlines_core", None)
        assert not outlines.is_installed()
        fresh = GrammarCompiler(compiler("bpe")._tokenizer, compiler("bpe")._vocab_size)
        for fails in (
            lambda: outlines.regex_source("a"),
            lambda: outlines.json_source(NULL),
            lambda: fresh.compile(source, eos_of("bpe")),
            lambda: fresh.warm(eos_of("bpe"), outlines=True),
        ):
            with pytest.raises(GrammarError, match="extra `outlines`"):
                fails()

    def test_refuses_an_index_that_needs_much_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outlines, "_MAX_INDEX_BYTES", 10_000)
        with pytest.raises(GrammarError, match="memory"):
            compile_source(outlines.regex_source("[a-z]{5,40}"))
