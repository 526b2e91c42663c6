"""Which form a chat template has, and that its grammar allows what the form's reader reads."""

from __future__ import annotations

import dataclasses

import pytest

from engine.grammar.backend_llguidance import json_source
from engine.grammar.rule_source import rule_source
from service.errors import ServiceError
from service.grammar.spec import Grammar
from service.openai.call_formats.dialect import Dialect
from service.openai.call_formats.pieces import Parsed
from service.openai.chat import dialect_of
from service.openai.tools import Tool, Toolbox
from tests.engine.grammar.grammars import compiler, takes, tokenizer
from tests.service.fakes import SERVER, demo_tokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool(name="weather", parameters=SCHEMA)
ARGUMENTS = '{"city": "Paris"}'

TEMPLATES = {
    "hermes": '{{ tools }}<tool_call>\n{"name": <function-name>}\n</tool_call>',
    "llama3": '{{ tools }}Respond in the format {"name": function name, "parameters": dictionary}',
    "mistral": "{{ tools }}[TOOL_CALLS]",
    "deepseek_v3": "<｜tool▁calls▁begin｜>```json",
    "qwen3_coder": "{{ tools }}<tool_call>\n<function=f>\n<parameter=p>\nv\n</parameter>",
    "glm4": "{{ tools }}<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>v</arg_value>\n</tool_call>",
    "kimi_k2": "{{ tools }}<|tool_calls_section_begin|>",
    "granite": "{{ tools }}<|tool_call|>",
    "harmony": "{{ tools }}<|start|><|channel|>final<|message|>",
    "tokenwire": '{{ tools }}{"function": {"_name": "f"}}',
}
CALLS = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama3": f'{{"name": "weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}]',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    f"```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "harmony": "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    + ARGUMENTS,
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "</function>\n</tool_call>",
    "glm4": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    f"<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {ARGUMENTS}}}]',
}  # fmt: skip
MARKED = [
    "hermes", "llama3", "mistral", "deepseek_v3", "qwen3_coder", "glm4", "kimi_k2", "granite",
]  # fmt: skip


def dialect(template: str, **settings: str) -> Dialect:
    takes_tools = "{{ tools" in template
    return Dialect.of(template, lambda _: None, takes_tools=takes_tools, **settings)


def allows(form: Dialect, text: str, *, may_answer: bool) -> bool:
    """Whether the grammar of the form allows a whole text."""
    grammar = form.call_grammar(Toolbox(tools=(WEATHER,), may_answer=may_answer))
    lead = [] if grammar.lead is None else [grammar.lead]
    return takes(rule_source([*lead, grammar.value], json_source), text)


@pytest.mark.parametrize("form", TEMPLATES)
def test_the_template_tells_the_form(form: str) -> None:
    assert dialect(TEMPLATES[form]).calls.name == form


def test_a_setting_wins_over_the_template_and_without_tools_the_form_is_ours() -> None:
    assert dialect(TEMPLATES["hermes"], calls="llama3").calls.name == "llama3"
    assert dialect("{{ messages }}").calls.name == "tokenwire"


@pytest.mark.parametrize("form", CALLS)
def test_a_forced_call_has_the_native_form_and_nothing_else(form: str) -> None:
    native = dialect(TEMPLATES[form])
    assert allows(native, CALLS[form], may_answer=False)
    assert not allows(native, "hello", may_answer=False)
    assert not allows(native, CALLS[form].replace("weather", "rain"), may_answer=False)
    assert not allows(native, CALLS[form].replace("city", "town"), may_answer=False)


@pytest.mark.parametrize("form", MARKED)
def test_with_auto_text_is_free_until_a_call_begins(form: str) -> None:
    native = dialect(TEMPLATES[form])
    assert allows(native, "hello {", may_answer=True)
    assert allows(native, '{"a": 3}', may_answer=True)
    assert allows(native, CALLS[form], may_answer=True)
    assert not allows(native, CALLS[form].replace("city", "town"), may_answer=True)


def test_a_grammar_begins_after_the_reasoning() -> None:
    thinking = dialect(TEMPLATES["hermes"] + "</think>")
    assert allows(thinking, f"<think>hm</think>\n\n{CALLS['hermes']}", may_answer=False)
    assert allows(thinking.after("x<think>\n"), f"a </think>{CALLS['hermes']}", may_answer=False)
    assert not allows(thinking.after("<think></think>\n\n"), "hm</think>", may_answer=False)


def test_a_name_that_would_end_a_marker_is_refused() -> None:
    tool = Tool(name="a<b", parameters=SCHEMA)
    with pytest.raises(ServiceError, match="must not have white space"):
        dialect(TEMPLATES["hermes"]).call_grammar(Toolbox(tools=(tool,), may_answer=True))


@pytest.mark.parametrize(
    ("settings", "calls", "reasoning"),
    [
        ({}, "tokenwire", "none"),
        ({"tool_call_parser": "mistral", "reasoning_parser": "think"}, "mistral", "think"),
        ({"tool_call_parser": "harmony", "reasoning_parser": "harmony"}, "harmony", "harmony"),
    ],
)
def test_settings_win_over_the_template(
    settings: dict[str, str], calls: str, reasoning: str
) -> None:
    server = dataclasses.replace(SERVER, **settings)
    told = dialect_of(demo_tokenizer(), server)
    assert (told.calls.name, told.reasoning) == (calls, reasoning)


@pytest.mark.parametrize(
    ("begun", "is_open", "is_answer"),
    [("<think>a", True, False), ("<think>a</think>b", False, True), ("b", False, True)],
)
def test_a_message_that_is_continued_says_whether_it_is_a_thought(
    begun: str, is_open: bool, is_answer: bool
) -> None:
    told = dialect("</think>").after(f"<assistant>{begun}", begun)
    assert (told.is_open, told.is_answer) == (is_open, is_answer)


def test_gpt_oss_may_think_and_speak_before_a_constrained_answer() -> None:
    template = TEMPLATES["harmony"]
    channels = Dialect.of(template, tokenizer("demo").token_to_id, takes_tools=True)
    lead = channels.constrained(Grammar(kind="json", value=SCHEMA)).lead
    source = rule_source([lead, {"schema": SCHEMA}], json_source)
    matcher = compiler("demo").compile(source, frozenset({0}))
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
        "<|channel|>commentary<|message|>Well.<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{ARGUMENTS}"
    )
    matcher.advance(tokenizer("demo").encode(text, add_special_tokens=False).ids)
    assert matcher.raw.is_accepting()


@pytest.mark.parametrize(
    "head",
    [
        "<|channel|>commentary to=functions.weather ",
        " to=functions.weather<|channel|>commentary ",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.weather<|channel|>"
        "commentary ",
    ],
)
def test_the_recipient_of_gpt_oss_may_stand_before_the_channel_or_behind_it(head: str) -> None:
    channels = Dialect.of(TEMPLATES["harmony"], tokenizer("demo").token_to_id, takes_tools=True)
    call = f"{head}<|constrain|>json<|message|>"
    for may_answer in (True, False):
        assert allows(channels, call + ARGUMENTS, may_answer=may_answer)
        assert not allows(channels, call + "{}", may_answer=may_answer)
    reader = channels.reader((WEATHER,))
    assert reader is not None
    parsed = Parsed.of([*reader.push(call + ARGUMENTS), *reader.finish(is_cut=False)])
    assert [(item.name, item.arguments) for item in parsed.calls] == [("weather", ARGUMENTS)]
    assert not parsed.content
