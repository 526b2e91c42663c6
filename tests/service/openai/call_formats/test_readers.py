"""Calls and reasoning in every form, whole and in pieces of any size."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.openai.call_formats.call_format import CallFormat
from service.openai.call_formats.deepseek_v3 import DeepSeekV3
from service.openai.call_formats.glm4 import Glm4
from service.openai.call_formats.granite import Granite
from service.openai.call_formats.harmony import Harmony
from service.openai.call_formats.hermes import Hermes
from service.openai.call_formats.kimi_k2 import KimiK2
from service.openai.call_formats.llama3 import Llama3
from service.openai.call_formats.mistral import Mistral
from service.openai.call_formats.pieces import Parsed, Reader
from service.openai.call_formats.qwen3_coder import Qwen3Coder
from service.openai.call_formats.think import PlainReader, ThinkReader
from service.openai.call_formats.tokenwire import Tokenwire
from service.openai.tools import Tool

TYPES = {"city": {"type": "string"}, "n": {"type": "integer"}, "more": {"type": "object"}}
WEATHER = Tool(name="w", parameters={"type": "object", "properties": TYPES})
TOOLS = (WEATHER, Tool(name="v"))
ARGUMENTS = '{"city": "Par}is \\" ", "n": {"a": [1]}}'
FORMATS: dict[str, CallFormat] = {
    item.name: item
    for item in (
        *(Hermes(), Llama3(), Mistral(), DeepSeekV3(), Harmony(), Tokenwire()),
        *(Qwen3Coder(), Glm4(), KimiK2(), Granite()),
    )
}
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"


def read(reader: Reader, text: str, size: int, *, is_cut: bool = False) -> Parsed:
    pieces = []
    for start in range(0, len(text), size):
        pieces += reader.push(text[start : start + size])
    return Parsed.of([*pieces, *reader.finish(is_cut=is_cut)])


def deepseek(*calls: str) -> str:
    made = "\n".join(f"{CALL_BEGIN}{call}{CALL_END}" for call in calls)
    return f"<｜tool▁calls▁begin｜>{made}<｜tool▁calls▁end｜>"


def kimi(*calls: str) -> str:
    made = "".join(f"<|tool_call_begin|>functions.{call}<|tool_call_end|>" for call in calls)
    return f"<|tool_calls_section_begin|>{made}<|tool_calls_section_end|>"


def qwen(name: str, **values: str) -> str:
    pairs = "".join(f"<parameter={key}>\n{values[key]}\n</parameter>\n" for key in values)
    return f"<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>"


def glm(name: str, **values: str) -> str:
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{values[key]}</arg_value>\n" for key in values
    )
    return f"<tool_call>{name}\n{pairs}</tool_call>"


ARGUMENT = "<|tool_call_argument_begin|>"
BLOCK = f"function<｜tool▁sep｜>w\n```json\n{ARGUMENTS}\n```"
THOUGHT = "<|channel|>analysis<|message|>hm{ <|end|><|start|>assistant"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", "hello <b>x</b>\n", "hello <b>x</b>\n", []),
        (
            "hermes",
            f'I will.\n<tool_call>\n{{"name": "w", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
            '<tool_call>\n{"name": "v", "arguments": {}}\n</tool_call>\n',
            "I will.",
            [("w", ARGUMENTS), ("v", "{}")],
        ),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "w"}</tool_call>', "",
         [("w", '{"a": 1}')]),
        ("hermes", '<tool_call>\n{"name": "w", "arguments": {"a": ', "", [("w", '{"a": ')]),
        ("hermes", "<tool_call>no</tool_call> x", "<tool_call>no</tool_call> x", []),
        ("llama3", f'{{"name": "w", "parameters": {ARGUMENTS}}}', "", [("w", ARGUMENTS)]),
        (
            "llama3",
            '<|python_tag|>{"name": "w", "parameters": {}}; {"name": "v", "parameters": {"a":1}}',
            "",
            [("w", "{}"), ("v", '{"a":1}')],
        ),
        ("llama3", '{"a": 3}', '{"a": 3}', []),
        ("llama3", '{"name": "Al", "parameters": {}} !', '{"name": "Al", "parameters": {}} !', []),
        ("llama3", "{ hello", "{ hello", []),
        ("mistral", f'[TOOL_CALLS][{{"name": "w", "arguments": {ARGUMENTS}}}, '
         '{"name": "v", "arguments": {}}]', "", [("w", ARGUMENTS), ("v", "{}")]),
        ("mistral", f"ok [TOOL_CALLS]w[ARGS]{ARGUMENTS}[TOOL_CALLS]v[ARGS]{{}}", "ok",
         [("w", ARGUMENTS), ("v", "{}")]),
        ("mistral", '[TOOL_CALLS][{"name": "w", "arguments": {}, "id": "a"}, '
         '{"name": "v", "arguments": {}, "id": "b"}]', "", [("w", "{}"), ("v", "{}")]),
        ("mistral", "[TOOL_", "[TOOL_", []),
        ("deepseek_v3", "x" + deepseek(BLOCK, BLOCK.replace("w", "v", 1)), "x",
         [("w", ARGUMENTS), ("v", ARGUMENTS)]),
        ("deepseek_v3", deepseek('w<｜tool▁sep｜>{"a":1}', "v<｜tool▁sep｜>{}"), "",
         [("w", '{"a":1}'), ("v", "{}")]),
        ("harmony", f"{THOUGHT}<|channel|>commentary to=functions.w <|constrain|>json<|message|>"
         f"{ARGUMENTS}<|call|>", "", [("w", ARGUMENTS)]),
        ("harmony", f"{THOUGHT}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
         f"<|channel|>commentary to=functions.w <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
         "I look.", [("w", ARGUMENTS)]),
        ("harmony", f"{THOUGHT}<|channel|>final<|message|>Hello <|return|>", "Hello ", []),
        ("harmony", f"{THOUGHT} to=functions.w<|channel|>commentary json<|message|>{ARGUMENTS}"
         "<|call|>", "", [("w", ARGUMENTS)]),
        ("harmony", f" to=functions.w<|channel|>commentary <|constrain|>json<|message|>{ARGUMENTS}",
         "", [("w", ARGUMENTS)]),
        ("harmony", "to be<|return|>", "to be", []),
        ("harmony", "to=x y", "to=x y", []),
        ("qwen3_coder", f"I will.\n{qwen('w', city='Paris', n='3')}\n{qwen('v')}\n", "I will.",
         [("w", '{"city": "Paris", "n": 3}'), ("v", "{}")]),
        ("qwen3_coder", qwen("w", city="\n 12\n\n", n="x", more='{"a": [1, "</x>"]}'), "",
         [("w", '{"city": "\\n 12\\n\\n", "n": "x", "more": {"a": [1, "</x>"]}}')]),
        ("qwen3_coder", qwen("v", a="True", b='say "hi"', c="1e3", d="NaN", e=""), "",
         [("v", '{"a": true, "b": "say \\"hi\\"", "c": 1e3, "d": "NaN", "e": ""}')]),
        ("qwen3_coder", "<tool_call>\n<function=w><parameter=city>Pa<b>ris</parameter></function>"
         "</tool_call>", "", [("w", '{"city": "Pa<b>ris"}')]),
        ("qwen3_coder", "<tool_call> {} x", "<tool_call> {} x", []),
        ("qwen3_coder", "<tool_call>\n<function=w>\n<parameter=city>\nPa", "",
         [("w", '{"city": "Pa')]),
        ("glm4", f"ok {glm('w', city='Pa ris', n='-2')}{glm('v', x='[1]')}", "ok",
         [("w", '{"city": "Pa ris", "n": -2}'), ("v", '{"x": [1]}')]),
        ("glm4", "<tool_call>v</tool_call>", "", [("v", "{}")]),
        ("glm4", "<tool_call>{} no</tool_call>", "<tool_call>{} no</tool_call>", []),
        ("kimi_k2", "x" + kimi(f"w:0{ARGUMENT}{ARGUMENTS}", f"v:1{ARGUMENT}{{}}"), "x",
         [("w", ARGUMENTS), ("v", "{}")]),
        ("granite", f'<|tool_call|>[{{"name": "w", "arguments": {ARGUMENTS}}}, '
         '{"name": "v", "arguments": {}}]', "", [("w", ARGUMENTS), ("v", "{}")]),
        ("tokenwire", '{"function": {"_name": "w", "a": 1}}', "", [("w", '{"a": 1}')]),
        ("tokenwire", '{"x": 1}', '{"x": 1}', []),
    ],
)  # fmt: skip
def test_an_answer_is_read_alike_in_pieces_of_any_size(
    form: str, text: str, content: str, calls: list[tuple[str, str]], size: int
) -> None:
    parsed = read(FORMATS[form].reader(TOOLS), text, size)
    assert [(call.name, call.arguments) for call in parsed.calls] == calls
    assert parsed.content == content


ENDS = {
    "hermes": f'<tool_call>\n{{"name": "w", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama3": f'{{"name": "w", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "w", "arguments": {ARGUMENTS}}}]',
    "deepseek_v3": deepseek(BLOCK),
    "harmony": "<|channel|>commentary to=functions.w <|constrain|>json<|message|>" + ARGUMENTS,
    "qwen3_coder": qwen("w", city="Paris\n(FR)", n="3", more='{"a": [1]}'),
    "glm4": glm("w", city="Paris\n(FR)", n="3", more='{"a": [1]}'),
    "kimi_k2": kimi(f"w:0{ARGUMENT}{ARGUMENTS}"),
    "granite": f'<|tool_call|>[{{"name": "w", "arguments": {ARGUMENTS}}}]',
    "tokenwire": '{"function": {"_name": "w", "city": "x"}}',
}


@pytest.mark.parametrize("form", ENDS)
def test_a_call_that_is_cut_off_is_never_content(form: str) -> None:
    text = ENDS[form]
    opening = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "harmony": "<|channel|>",
               "deepseek_v3": "<｜tool▁calls▁begin｜>", "qwen3_coder": "<tool_call>",
               "glm4": "<tool_call>", "kimi_k2": "<|tool_calls_section_begin|>",
               "granite": "<|tool_call|>"}.get(form, text[0])  # fmt: skip
    for end in range(len(opening), len(text) + 1):
        whole = read(FORMATS[form].reader(TOOLS), text[:end], end, is_cut=True)
        assert whole.content == ""
        assert all(call.name == "w" for call in whole.calls)
        assert not whole.is_call or json.loads(whole.calls[0].arguments)
        assert read(FORMATS[form].reader(TOOLS), text[:end], 1, is_cut=True) == whole
    assert whole.is_call


@pytest.mark.parametrize("text", ['{"name": "Al', '{"name": "Al"', '{"b', "{ x"])
def test_json_that_calls_nothing_stays_text_when_it_is_cut_off(text: str) -> None:
    assert read(Llama3().reader(TOOLS), text, 2, is_cut=True).content == text


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nab\n</think>\n\nhello\n", False, "ab", "hello\n"),
        ("ab </think>x", True, "ab", "x"),
        ("ab </think>x", False, "", "ab </think>x"),
        ("<think>cut", False, "cut", ""),
        ("<thi", False, "", "<thi"),
        ("<think>\n\n</think>\n\nx", False, "", "x"),
    ],
)
def test_reasoning_is_split_from_the_answer(
    text: str, is_open: bool, reasoning: str, content: str, size: int
) -> None:
    parsed = read(ThinkReader(PlainReader(), is_open=is_open), text, size)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_a_name_comes_before_the_arguments_which_come_as_they_are_written() -> None:
    reader = Hermes().reader(TOOLS)
    assert not reader.push('<tool_call>\n{"name": "w", "arguments": ')
    name, first = reader.push('{"a": ')
    assert (getattr(name, "name", None), getattr(first, "arguments", None)) == ("w", '{"a": ')
    (rest,) = reader.push("1}}")
    assert (getattr(rest, "arguments", None), getattr(rest, "is_end", None)) == ("1}", True)


@pytest.mark.parametrize("form", ["qwen3_coder", "glm4"])
def test_a_string_comes_while_it_is_written_and_other_values_when_they_are_whole(form: str) -> None:
    whole = {"qwen3_coder": qwen, "glm4": glm}[form]("w", city="ABCDEF", n="123456")
    reader = FORMATS[form].reader(TOOLS)
    texts = ["".join(getattr(piece, "arguments", "") for piece in reader.push(c)) for c in whole]
    assert [text for text in texts if text] == [
        '{"city": ', '"A', *"BCDEF", '"', ', "n": ', "123456", "}"
    ]  # fmt: skip


def test_reasoning_in_the_analysis_channel_is_none_of_the_answer() -> None:
    parsed = read(Harmony().reader(TOOLS), f"{THOUGHT}<|channel|>final<|message|>x", 3)
    assert (parsed.reasoning, parsed.content) == ("hm{ ", "x")


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", CALL_BEGIN, CALL_END, "<｜tool▁sep｜>",
    "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "analysis", "commentary ",
    "to=functions.w", "<function=w>", "<parameter=n>", "</parameter>", "</function>", "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call|>", ARGUMENT,
    '{"name": "w", ', '"arguments": ', '"parameters": ', '"type": "function", ',
    '{"function": {"_name": "w", ', '"a": "}"', "{}", "{", "}", "[", "]", ";", "w", "\n", " ", "<",
]  # fmt: skip


EDITS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(FRAGMENTS), st.booleans()), max_size=4)


def edited(text: str, edits: list[tuple[float, str, bool]]) -> str:
    """A text with something else at some places, which replaces what was there or is put in."""
    for place, fragment, replaces in edits:
        at = int(place * len(text))
        text = text[:at] + fragment + text[at + replaces * len(fragment) :]
    return text


@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(0, 2),
    EDITS,
    st.sampled_from([None, True, False]),
    st.booleans(),
)
def test_any_text_is_read_alike_in_pieces_and_keeps_its_words(
    form: str, count: int, edits: list[tuple[float, str, bool]], is_open: bool | None, is_cut: bool
) -> None:
    text = edited(count * ENDS[form], edits)

    def reader() -> Reader:
        inner = FORMATS[form].reader(TOOLS)
        return inner if is_open is None else ThinkReader(inner, is_open=is_open)

    whole = read(reader(), text, max(len(text), 1), is_cut=is_cut)
    for size in (1, 3):
        assert read(reader(), text, size, is_cut=is_cut) == whole
    kept = whole.content + whole.reasoning + "".join(call.arguments for call in whole.calls)
    assert not set(kept) - set(text) - set('{}": ,\\n')  # a line break in a value is escaped
    assert all(call.name for call in whole.calls)
