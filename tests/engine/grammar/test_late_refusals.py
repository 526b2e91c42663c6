"""A schema that is accepted never fails in generation, and what is generated fits it.

Objects at random, of the keywords that together have led into dead ends.
"""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from engine.grammar.backend_llguidance import json_source
from engine.grammar.matcher import Matcher
from engine.protocol.errors import GrammarError
from tests.engine.grammar.grammars import compile_source, spell, walk

NAMES = ["a", "b", "ab", "c"]
PATTERNS = ["^a$", "^(a|b)$", "^a", "b$", ".?", "^(?:c)$", "^a$|^b$", "^[a-c]$", r"[^\s\S]"]
LEAVES: list[Any] = [
    True,
    False,
    {"const": "x"},
    {"enum": ["a", "b", 1]},
    {"type": "integer", "minimum": 0, "maximum": 9},
    {"type": "integer", "multipleOf": 1.5, "maximum": 99},
    {"type": "string", "pattern": "^$", "maxLength": 1},
    {"type": "string", "pattern": r"[^\s\S]"},
    {"type": "number", "minimum": 0.5, "maximum": 0.5},
]
NUM_SCHEMAS = 60


def schema(rng: random.Random, depth: int) -> Any:
    """A schema of some depth."""
    kind = rng.random()
    if depth <= 0 or kind < 0.1:
        return rng.choice(LEAVES)
    if kind < 0.25:
        return {"anyOf": [schema(rng, depth - 1) for _ in range(2)]}
    if kind < 0.4:
        return {"allOf": [obj(rng, depth - 1) for _ in range(2)]}
    return obj(rng, depth)


def obj(rng: random.Random, depth: int) -> dict[str, Any]:
    """An object's schema of some of the keywords."""
    made: dict[str, Any] = {
        "properties": {name: schema(rng, depth - 1) for name in rng.sample(NAMES, 2)},
        "patternProperties": {rng.choice(PATTERNS): schema(rng, depth - 1)},
        "additionalProperties": rng.choice([False, False, rng.choice(LEAVES)]),
        "required": rng.sample(NAMES, rng.randint(0, 2)),
        "dependentRequired": {rng.choice(NAMES): rng.sample(NAMES, 1)},
        "not": {"required": [rng.choice(NAMES)]},
        "oneOf": [{"required": [name]} for name in rng.sample(NAMES, 2)],
    }
    return {"type": "object"} | {key: made[key] for key in made if rng.random() < 0.4}


def accepted(seed: int) -> tuple[dict[str, Any], Matcher]:
    """The first random schema that is accepted."""
    rng = random.Random(seed)
    while True:
        made = obj(rng, 2)
        try:
            return made, compile_source(json_source(made))
        except GrammarError:
            continue


@pytest.mark.parametrize("seed", range(NUM_SCHEMAS))
def test_an_accepted_schema_has_no_dead_end(seed: int) -> None:
    made, matcher = accepted(seed)
    for path in range(4):
        tokens = walk(matcher.copy(), path)
        if len(tokens) < 60:  # the text is complete
            jsonschema.Draft202012Validator(made).validate(json.loads(spell(tokens)))
