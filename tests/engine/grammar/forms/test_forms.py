"""Random schemas of all keywords, judged by `jsonschema`: what fits is reachable, else nothing."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from benchmarks.json_schema_suite import is_reachable, matcher_of
from engine.grammar.backend_llguidance import JSON_OPTIONS
from engine.grammar.forms import lark_source
from engine.protocol.errors import GrammarError

Schema = dict[str, Any]

SCALARS: list[Any] = [None, True, False, 0, 1, 2, 3, 1.5, "", "a", "ab", "b", "ba"]
MEMBERS = [None, True, 0, 1, 2, 1.5, "a", "ab"]
NAMES = ["a", "b", "ab", "c"]
VALUES = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: (
        st.lists(st.sampled_from(MEMBERS) | inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES), inner, max_size=2)
    ),
    max_leaves=3,
)
LEAVES = st.one_of(
    st.booleans(),
    st.just({}),
    st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"]).map(
        lambda name: {"type": name}
    ),
    st.sampled_from([*SCALARS, [], [1], {"a": 1}]).map(lambda value: {"const": value}),
    st.lists(st.sampled_from(SCALARS), min_size=1, max_size=3).map(lambda some: {"enum": some}),
    st.sampled_from(
        [
            {"minimum": 1},
            {"exclusiveMaximum": 2},
            {"multipleOf": 2},
            {"minLength": 1},
            {"maxLength": 1},
            {"pattern": "a"},
            {"pattern": "^b|b$"},
            {"minItems": 1},
            {"maxItems": 1},
            {"required": ["a"]},
            {"maxProperties": 1},
            {"minProperties": 1},
            {"uniqueItems": True, "items": {"enum": [1, "a", None]}},
            {"dependentRequired": {"a": ["b"]}},
        ]
    ),
)


def _applied(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(inner, min_size=1, max_size=2)
    parts = st.one_of(
        inner.map(lambda s: {"items": s}),
        pairs.map(lambda some: {"prefixItems": some}),
        inner.map(lambda s: {"contains": s}),
        inner.map(lambda s: {"contains": s, "maxContains": 1}),
        inner.map(lambda s: {"contains": s, "minContains": 2}),
        inner.map(lambda s: {"properties": {"a": s}}),
        pairs.map(lambda some: {"properties": dict(zip("ab", some, strict=False))}),
        pairs.map(lambda some: {"patternProperties": dict(zip(["a", "b$"], some, strict=False))}),
        inner.map(lambda s: {"additionalProperties": s}),
        inner.map(lambda s: {"propertyNames": s}),
        inner.map(lambda s: {"dependentSchemas": {"a": s}}),
        inner.map(lambda s: {"not": s}),
        pairs.map(lambda some: {"anyOf": some}),
        pairs.map(lambda some: {"oneOf": some}),
        st.tuples(inner, inner, inner).map(
            lambda some: dict(zip(("if", "then", "else"), some, strict=True))
        ),
        inner.map(lambda s: {"unevaluatedItems": s}),
        inner.map(lambda s: {"unevaluatedProperties": s}),
    )
    return st.lists(
        parts | LEAVES.filter(lambda s: isinstance(s, dict)), min_size=1, max_size=3
    ).map(lambda some: {key: value for part in some for key, value in part.items()})


SCHEMAS = st.recursive(LEAVES, _applied, max_leaves=5).filter(lambda s: isinstance(s, dict))


_USUAL = b'{}[]:, "ab012.'  # characters that end texts soon


def compiled(schema: Schema) -> LLMatcher | None:
    """The matcher of a schema, None if nothing fits it; objects stay open."""
    try:
        start, rules = lark_source(schema, JSON_OPTIONS, are_closed=False)
    except GrammarError as error:
        if "nsatisfiable" in str(error):
            return None
        raise
    return matcher_of(LLMatcher.grammar_from_lark(f"start: {start}\n{rules}"))


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.lists(VALUES, min_size=8, max_size=8))
def test_what_fits_is_reachable_and_nothing_else(schema: Schema, values: list[Any]) -> None:
    oracle = Draft202012Validator(schema)
    try:
        matcher = compiled(schema)
    except GrammarError:
        assume(False)
        return
    for value in values:
        found = matcher is not None and is_reachable(matcher, value)
        assert found == oracle.is_valid(value), value


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_what_is_generated_fits_and_has_no_dead_end(schema: Schema, chance: Random) -> None:
    try:
        matcher = compiled(schema)
    except GrammarError:
        matcher = None
    assume(matcher is not None)
    assert matcher is not None
    text = b""
    while not matcher.is_stopped() and len(text) < 200:
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(0x20, 0x7F) if bits >> byte & 1]
        assert allowed or matcher.is_accepting(), text
        if not allowed or (matcher.is_accepting() and chance.random() < 0.5):
            break
        text += bytes([chance.choice([byte for byte in allowed if byte in _USUAL] or allowed)])
        assert matcher.consume_tokens([text[-1]])
    if matcher.is_accepting():
        assert Draft202012Validator(schema).is_valid(json.loads(text)), text
