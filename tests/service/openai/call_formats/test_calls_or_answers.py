"""Calls, or else an answer of a given form: what the grammar allows, and how it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from service.errors import ServiceError
from service.grammar.checker import GrammarChecker
from service.grammar.spec import Grammar
from service.openai.call_formats.dialect import Dialect
from service.openai.call_formats.pieces import Parsed
from service.openai.tools import Tool, Toolbox
from tests.engine.grammar.grammars import takes
from tests.service.grammar.checking import checking
from tests.service.openai.call_formats.test_dialect import (
    ARGUMENTS,
    CALLS,
    SCHEMA,
    TEMPLATES,
    WEATHER,
    dialect,
)

ANSWER = '{"name": "weather", "note": "<tool_call>[TOOL_CALLS]"}'
TEXTS = {"name": {"type": "string"}, "note": {"type": "string"}}
FORM = Grammar(kind="json", value={"type": "object", "properties": TEXTS, "required": [*TEXTS]})
ENVELOPE = '{"function": {"_name": "weather", "city": "Paris"}}'
TOOLBOX = Toolbox(tools=(WEATHER, Tool(name="time")), may_answer=True)
FORMS = {**CALLS, "tokenwire": ENVELOPE}
ALIKE = [
    '{"n": 1}', '{"name": "weathervane"}', '{"name": "weather"}', '{"name": "w"}',
    '{"function": {"_name": "rain"}}', '{"function": 1}', '[{"n": 1}]', "[]", '"[TOOL"', '"<to"',
    "null",
]  # fmt: skip
FINAL = "<|channel|>final<|message|>"


@pytest_asyncio.fixture
async def checker() -> AsyncGenerator[GrammarChecker]:
    async with checking() as started:
        yield started


def answer_in(form: str, answer: str = ANSWER) -> str:
    return FINAL + answer if form == "harmony" else answer


def read(form: Dialect, text: str, size: int, *, is_cut: bool = False) -> Parsed:
    reader = form.reader(TOOLBOX.tools, form.call_grammar(TOOLBOX, FORM).beginnings)
    assert reader is not None
    pieces = []
    for start in range(0, len(text), size):
        pieces += reader.push(text[start : start + size])
    return Parsed.of([*pieces, *reader.finish(is_cut=is_cut)])


@pytest.mark.parametrize("form", FORMS)
async def test_a_text_is_a_call_or_such_an_answer_and_nothing_else(
    checker: GrammarChecker, form: str
) -> None:
    source = await checker.check(dialect(TEMPLATES[form]).call_grammar(TOOLBOX, FORM))
    assert takes(source, FORMS[form])
    assert takes(source, answer_in(form))
    assert not takes(source, answer_in(form, "hello"))
    assert not takes(source, answer_in(form, '{"name": "weather"}'))
    assert not takes(source, answer_in(form, FORMS[form] + ANSWER))
    assert not takes(source, FORMS[form].replace("city", "town"))
    assert not takes(source, FORMS[form].replace("weather", "rain"))


@pytest.mark.parametrize("form", FORMS)
async def test_an_answer_may_go_the_way_of_a_call_for_a_while(
    checker: GrammarChecker, form: str
) -> None:
    for answer in ALIKE:
        value = {"enum": [json.loads(answer)]}
        wanted = dialect(TEMPLATES[form]).call_grammar(TOOLBOX, Grammar(kind="json", value=value))
        source = await checker.check(wanted)
        assert takes(source, answer_in(form, answer))
        assert takes(source, FORMS[form])
        for size in (1, 1000):
            parsed = read(dialect(TEMPLATES[form]), answer_in(form, answer), size)
            assert (parsed.content, parsed.calls) == (answer, ())


@pytest.mark.parametrize("form", FORMS)
async def test_schemas_of_tools_may_have_names_and_references(
    checker: GrammarChecker, form: str
) -> None:
    city = {
        "$id": "https://example.com/w",
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/c"}},
        "required": ["city"],
        "$defs": {"c": {"const": "Paris"}},
    }
    toolbox = Toolbox(tools=(Tool(name="weather", parameters=city),), may_answer=True)
    source = await checker.check(dialect(TEMPLATES[form]).call_grammar(toolbox, FORM))
    assert takes(source, FORMS[form])
    assert takes(source, answer_in(form))
    assert not takes(source, FORMS[form].replace("Paris", "Rome"))


@pytest.mark.parametrize("form", FORMS)
async def test_a_forced_call_is_nothing_but_a_call(checker: GrammarChecker, form: str) -> None:
    forced = dataclasses.replace(TOOLBOX, may_answer=False)
    source = await checker.check(dialect(TEMPLATES[form]).call_grammar(forced, FORM))
    assert takes(source, FORMS[form])
    assert not takes(source, answer_in(form))


@pytest.mark.parametrize("form", ["hermes", "llama3", "tokenwire"])
async def test_both_begin_after_the_reasoning(checker: GrammarChecker, form: str) -> None:
    thinking = dialect(TEMPLATES[form] + "</think>")
    source = await checker.check(thinking.call_grammar(TOOLBOX, FORM))
    for text in (FORMS[form], ANSWER):
        assert takes(source, text)
        assert takes(source, f"<think>hm {{</think>\n\n{text}")
        assert not takes(source, f"<think>hm</think>hello {text}")
    parsed = read(thinking, f"<think>hm</think>\n\n{ANSWER}", 3)
    assert (parsed.reasoning, parsed.content, parsed.calls) == ("hm", ANSWER, ())


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_neither_is_read_as_the_other(form: str, size: int) -> None:
    told = dialect(TEMPLATES[form])
    parsed = read(told, answer_in(form), size)
    assert (parsed.content, parsed.calls) == (ANSWER, ())
    called = read(told, FORMS[form], size)
    ((name, arguments),) = ((call.name, call.arguments) for call in called.calls)
    assert (name, json.loads(arguments), called.content) == ("weather", json.loads(ARGUMENTS), "")
    assert called.is_call


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_is_cut_off_is_all_there_once_it_is_no_call(form: str) -> None:
    begun = '{"note": "[TOOL_CALLS]<tool_call>{\\"name'
    for size in (1, 1000):
        parsed = read(dialect(TEMPLATES[form]), answer_in(form, begun), size, is_cut=True)
        assert (parsed.content, parsed.calls) == (begun, ())


@pytest.mark.parametrize(
    ("form", "answer", "beginning"),
    [
        ("tokenwire", Grammar(kind="json", value={"type": "object"}), '"_name": "weather"'),
        ("llama3", Grammar(kind="json", value={}), '{"name": "weather", "parameters": '),
        ("llama3", Grammar(kind="regex", value=r"\{.*\}"), '{"name": "weather", "parameters": '),
        ("hermes", Grammar(kind="regex", value=".*"), "<tool_call>"),
        ("mistral", Grammar(kind="regex", value=r"\[[A-Z_]+\].*"), "[TOOL_CALLS]"),
    ],
)
async def test_an_answer_that_may_begin_like_a_call_is_refused(
    checker: GrammarChecker, form: str, answer: Grammar, beginning: str
) -> None:
    with pytest.raises(ServiceError, match="no answer may begin like a call") as refused:
        await checker.check(dialect(TEMPLATES[form]).call_grammar(TOOLBOX, answer))
    assert beginning in refused.value.message
    assert refused.value.field == "parameters.grammar.other"


@pytest.mark.parametrize("form", ["hermes", "mistral", "deepseek_v3", "harmony"])
async def test_where_calls_have_marks_an_answer_may_be_any_object(
    checker: GrammarChecker, form: str
) -> None:
    anything = Grammar(kind="json", value={"type": "object"})
    source = await checker.check(dialect(TEMPLATES[form]).call_grammar(TOOLBOX, anything))
    text = '{"name": "weather", "parameters": {"a": 1}}'
    assert takes(source, answer_in(form, text))
    parsed = read(dialect(TEMPLATES[form]), answer_in(form, text), 1)
    assert (parsed.content, parsed.calls) == (text, ())


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        (Grammar(kind="json", value={"type": "nonsense"}), "parameters.grammar.other"),
        (Grammar(kind="regex", value=5), "parameters.grammar.other"),
        (Grammar(kind="json", value=None), "parameters.grammar.value"),
        (Grammar(kind="", value=SCHEMA), "parameters.grammar.type"),
    ],
)
async def test_what_is_wrong_with_the_answers_form_is_told_apart_from_the_tools(
    checker: GrammarChecker, answer: Grammar, field: str
) -> None:
    with pytest.raises(ServiceError) as refused:
        await checker.check(Dialect().call_grammar(TOOLBOX, answer))
    assert refused.value.field == field
    wrong = Toolbox(tools=(Tool(name="f", parameters={"properties": 5}),), may_answer=True)
    with pytest.raises(ServiceError, match=r"tools\[0\]"):
        await checker.check(Dialect().call_grammar(wrong, FORM))
