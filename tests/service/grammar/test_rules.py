"""Grammars put together of texts, schemas and what comes before them, by the worker process."""

from __future__ import annotations

from typing import Any

import pytest

from service.grammar.checker import GrammarChecker
from service.grammar.spec import Grammar
from tests.engine.grammar.grammars import takes
from tests.service.grammar.checking import SCHEMA, reason, regex, schema

TEXT = '{"name": "a"}'
OPEN = [{"until": "</t>", "before": "any"}, {"text": "lines"}]
THOUGHT = {"optional": ["<t>", *OPEN]}
NESTED: dict[str, Any] = {"type": "object"}
for _ in range(60):
    NESTED = {"type": "object", "properties": {"a": NESTED}}


def rule(value: Any, **options: Any) -> Grammar:
    return Grammar(kind="rule", value=value, **options)


CALL = ["<call>", {"schema": SCHEMA}, "</call>"]
AUTO = {"choice": [{"text": "any"}, [{"until": "<call>", "before": "any"}, *CALL[1:]]]}


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (rule(CALL), f"<call>{TEXT}</call>", f"a<call>{TEXT}</call>"),
        (rule(AUTO), f"a <call>{TEXT}</call>", 'a <call>{"x": 1}</call>'),
        (rule(CALL, lead=THOUGHT), f"<t>hm</t>\n<call>{TEXT}</call>", "<t>hm</t>\nhello"),
        (schema(SCHEMA, lead=THOUGHT), f"<t>{{</t>\n\n{TEXT}", "<t>a</t>x"),
        (schema(SCHEMA, lead=THOUGHT), TEXT, "x"),
        (schema(SCHEMA, lead=OPEN, or_text=True), "a</t>hello", 'a</t>{"x": 1}'),
        (schema(SCHEMA, lead=OPEN, or_text=True), f"a</t>{TEXT}", "a"),
        (schema({"enum": [2**60 + 1]}, lead=THOUGHT), f"<t>a</t>{2**60 + 1}", f"<t>a</t>{2**60}"),
        (regex("[a-c]+"), "abc", "abd"),
        (regex("[a-c]+/x", lead=THOUGHT), "<t>xyz</t>abc/x", "<t>xyz</t>xyz"),
        (rule({"repeat": ["a", {"optional": "b"}]}), "aaba", "abb"),
    ],
)
async def test_only_what_fits_is_allowed(
    checker: GrammarChecker, grammar: Grammar, right: str, wrong: str
) -> None:
    source = await checker.check(grammar)
    assert takes(source, right)
    assert not takes(source, wrong)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"type": "object", "minProperties": 3}, "minProperties"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-around"),
        (NESTED, "nested more than 100 deep"),
    ],
)
async def test_a_schema_behind_free_text_is_checked_like_one_by_itself(
    checker: GrammarChecker, value: Any, text: str
) -> None:
    behind = {
        "choice": [{"text": "any"}, [{"until": "<call>", "before": "any"}, {"schema": value}]]
    }
    for grammar in (schema(value), schema(value, lead=THOUGHT), rule(behind)):
        assert text in await reason(checker, grammar)
