"""Conversations: valid messages, chat templates, answers and tool calls, and refusals."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from service.errors import ErrorKind, ServiceError
from service.generation.generation import Token, TokenEvent
from service.generation.parameters import Parameters
from service.grammar.spec import Grammar
from service.openai import chat, chat_answer
from service.openai.call_formats.dialect import Dialect
from service.openai.chat import ChatRequest, Message, ToolCallFormat
from service.openai.chat_answer import ChatDelta, ChatStream
from service.openai.tools import Tool, Toolbox
from service.openai.usage import Usage
from service.text.tokenizer import TextTokenizer
from tests.service.fakes import (
    ANSWER_HEAD,
    LIMITS,
    TOP_TOKENS,
    demo_tokenizer,
    generation,
    raw_tokenizer,
)

GRAMMAR = Grammar(kind="json", value={})
WEATHER = Tool(name="get_weather", parameters={"properties": {"location": {"type": "string"}}})
TIME = Tool(name="get_time")
CALL = '{"function": {"_name": "get_weather", "location": "Paris"}}'


def request(*messages: Message, **changes: Any) -> ChatRequest:
    return ChatRequest(messages=messages, parameters=Parameters(), **changes)


def user(content: Any) -> ChatRequest:
    return request(Message(role="user", content=content))


def content_of(content: Any) -> str:
    (turn,) = user(content).template_messages()
    assert turn.keys() == {"role", "content"}
    text = turn["content"]
    assert isinstance(text, str)
    return text


def refusal(wanted: ChatRequest) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        _ = wanted.check(LIMITS) or wanted.template_messages()
    return refused.value


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "text", "text": "a", "cache_control": {}}], "a"),
    ],
)
def test_content_is_a_text_or_its_parts(content: Any, text: str) -> None:
    assert content_of(content) == text


@pytest.mark.parametrize(
    "content",
    [
        5,
        True,
        {"type": "text", "text": "a"},
        ["a"],
        [{"text": "a"}],
        [{"type": "text"}],
        [{"type": "text", "text": None}],
        [{"type": "audio"}],
        [None],
    ],
)
def test_content_of_any_other_shape_is_refused(content: Any) -> None:
    error = refusal(
        request(Message(role="system", content="x"), Message(role="user", content=content))
    )
    assert error.kind is ErrorKind.SHAPE
    assert error.field == "messages[1].content"
    assert "messages[1].content: data did not match any variant" in error.message


def test_images_are_refused_by_name() -> None:
    error = refusal(
        user([{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}])
    )
    assert error.kind is ErrorKind.VALIDATION
    assert "image_url" in error.message
    assert error.field == "messages[0].content"


@pytest.mark.parametrize(
    ("message", "missing"),
    [
        (Message(role=None, content="x"), "messages[1].role"),
        (Message(role=None), "messages[1].role"),
        (Message(role="user"), "messages[1].content"),
    ],
)
def test_the_missing_field_of_a_message_is_named(message: Message, missing: str) -> None:
    error = refusal(request(Message(role="system", content="x"), message))
    assert error.kind is ErrorKind.SHAPE
    assert error.field == missing
    path, _, name = missing.rpartition(".")
    assert error.message.endswith(f": {path}: missing field `{name}`")


def test_messages_are_required() -> None:
    error = refusal(request())
    assert (error.kind, error.field) == (ErrorKind.SHAPE, "messages")


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "0", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"b": 1, "a": 2}, {"b": 1, "a": 2}),
        ('{"b": 1, "a": 2}', {"b": 1, "a": 2}),
        ("not json", "not json"),
        (None, None),
    ],
)
def test_calls_of_earlier_turns_reach_the_template(arguments: Any, seen: Any) -> None:
    (turn,) = request(Message(role="assistant", tool_calls=(call(arguments),))).template_messages()
    assert turn == {"role": "assistant", "content": "", "tool_calls": [call(seen)]}
    if isinstance(seen, dict):
        assert list(turn["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]


def test_answers_of_tools_reach_the_template() -> None:
    message = Message(role="tool", content="5", name="f", tool_call_id="0")
    assert request(message).template_messages() == [
        {"role": "tool", "content": "5", "name": "f", "tool_call_id": "0"}
    ]


@pytest.mark.parametrize("n", [None, 1, 3])
def test_answers_up_to_the_limit_are_allowed(n: int | None) -> None:
    wanted = request(Message(role="user", content="x"), n=n)
    wanted.check(LIMITS)
    assert wanted.num_choices == (n or 1)


@pytest.mark.parametrize("n", [0, 4])
def test_no_answer_and_too_many_are_refused(n: int) -> None:
    error = refusal(request(Message(role="user", content="x"), n=n))
    assert (error.kind, error.field) == (ErrorKind.VALIDATION, "n")
    assert error.message == f"Input validation error: `n` must be > 0 and <= 3. Given: {n}"


@pytest.mark.parametrize(
    ("may_answer", "other", "beginnings"),
    [(True, GRAMMAR, ('{"function": {"_name": "get_weather"',)), (False, None, ())],
)
def test_a_format_is_what_an_answer_has_that_need_not_be_a_call(
    may_answer: bool, other: Grammar | None, beginnings: tuple[str, ...]
) -> None:
    wanted = request(Message(role="user", content="x"), tools=(WEATHER,))
    wanted = dataclasses.replace(wanted, parameters=Parameters(grammar=GRAMMAR))
    toolbox = Toolbox(tools=(WEATHER,), may_answer=may_answer)
    grammar = wanted.answering("x", toolbox, Dialect()).parameters.grammar
    assert grammar is not None
    assert (grammar.value, grammar.or_text) == (toolbox.schema(), False)
    assert (grammar.other, grammar.beginnings) == (other, beginnings)
    assert wanted.answering("x", None, Dialect()).parameters.grammar == GRAMMAR


def test_tools_become_a_grammar_unless_they_are_switched_off() -> None:
    wanted = request(Message(role="user", content="x"), tools=(WEATHER, TIME))
    chosen = wanted.answering("x", Toolbox(tools=(WEATHER,), may_answer=False), Dialect())
    assert chosen.tools == (WEATHER,)
    assert chosen.parameters.grammar is not None
    without = wanted.answering("x", None, Dialect())
    assert (without.tools, without.parameters.grammar) == ((), None)


def with_template(template: str | None) -> TextTokenizer:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer())
    tokenizer.chat_template = template
    return TextTokenizer(tokenizer, frozenset({2}))


def template_error(template: str | None, messages: list[dict[str, Any]] | None = None) -> str:
    with pytest.raises(ServiceError) as refused:
        with_template(template).render_chat(messages or [{"role": "user", "content": "x"}])
    assert refused.value.kind is ErrorKind.TEMPLATE
    return refused.value.message


def test_a_template_writes_the_prompt() -> None:
    tokenizer = with_template("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "[user]hi"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("", "[system]Be brief.[user]hi[system]In verse."),
        ("{# developer #}", "[developer]Be brief.[user]hi[developer]In verse."),
    ],
)
def test_a_developer_is_the_system_to_a_template_that_knows_no_developer(
    start: str, expected: str
) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    roles = [("developer", "Be brief."), ("user", "hi"), ("developer", "In verse.")]
    messages = [{"role": role, "content": content} for role, content in roles]
    assert with_template(start + template).render_chat(messages) == expected
    assert messages[0]["role"] == "developer"


def test_the_demo_template_ends_where_the_assistant_begins() -> None:
    prompt = demo_tokenizer().render_chat(user("hello").template_messages())
    before, _, after = prompt.partition("hello")
    assert "user" in before
    assert "assistant" in after


def test_a_model_without_a_template_has_no_conversations() -> None:
    assert template_error(None) == "Template error: template not found"


def test_a_template_may_refuse_a_conversation() -> None:
    text = template_error("{{ raise_exception('roles must alternate') }}")
    assert text.startswith("Template error: syntax error: roles must alternate")


def test_an_undefined_value_is_a_template_error() -> None:
    assert template_error("{{ nothing.at_all }}").startswith("Template error: undefined value (")


@pytest.mark.parametrize("template", ["{% if %}", "{{ 1 + 'a' }}", "{{ messages[0].content.x() }}"])
def test_a_broken_template_is_a_template_error(template: str) -> None:
    assert template_error(template).startswith("Template error: ")


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ 10.0 ** (1000 * messages | length) }}"])
def test_any_failure_of_a_template_is_a_template_error(template: str) -> None:
    assert template_error(template).startswith("Template error: ")


def test_templates_run_in_a_sandbox() -> None:
    text = template_error("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert text.startswith("Template error: ")


NESTED = "[" * 200_000 + "]" * 200_000


def test_arguments_nested_too_deeply_stay_a_string() -> None:
    (turn,) = request(Message(role="assistant", tool_calls=(call(NESTED),))).template_messages()
    assert turn["tool_calls"] == [call(NESTED)]


async def test_half_a_surrogate_pair_does_not_get_into_the_prompt() -> None:
    message = Message(role="assistant", tool_calls=(call(json.dumps({"a": "\ud800"})),))
    prompt = demo_tokenizer().render_chat(request(message).template_messages())
    await demo_tokenizer().encode(prompt)


A = Token(5, " a", -0.5, False)
EOS = Token(2, "<eos>", -0.25, True)


def test_an_answer_counts_its_tokens() -> None:
    answer = chat_answer.answer(user("x"), generation(), ANSWER_HEAD)
    assert (answer.text, answer.finish_reason, answer.head) == (" a time", "length", ANSWER_HEAD)
    assert answer.usage == Usage(3, 2)
    assert answer.logprobs is None


@pytest.mark.parametrize("top_tokens", [[], TOP_TOKENS])
def test_an_answer_has_logprobs_if_they_were_asked_for(top_tokens: list[list[Token]]) -> None:
    wanted = request(Message(role="user", content="x"), logprobs=True)
    result = generation(top_tokens=top_tokens)
    answer = chat_answer.answer(wanted, result, ANSWER_HEAD)
    assert answer.logprobs is not None
    assert list(answer.logprobs) == list(zip(result.tokens, top_tokens or [[], []], strict=True))


def deltas(wanted: ChatRequest, *events: TokenEvent) -> list[ChatDelta]:
    stream = ChatStream(wanted, ANSWER_HEAD)
    return [part for event in events for part in stream.push(event)]


def spoken(
    text: str, wanted: ChatRequest, size: int = 3, ended_by: str = "eos_token"
) -> list[ChatDelta]:
    """The parts of a text that comes in pieces and then ends."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    events = [TokenEvent(Token(9, piece, -0.5, False), []) for piece in pieces]
    result = dataclasses.replace(generation(), text=text, finish_reason=ended_by)
    return deltas(wanted, *events, TokenEvent(EOS, [], result))


def test_a_delta_has_no_text_of_control_tokens() -> None:
    first, last = deltas(user("x"), TokenEvent(A, []), TokenEvent(EOS, [], generation()))
    assert (first.text, first.finish_reason, first.logprobs) == (" a", None, None)
    assert (last.text, last.finish_reason) == ("", "length")


def tools_request(**changes: Any) -> ChatRequest:
    return request(Message(role="user", content="x"), tools=(WEATHER, TIME), **changes)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_call_streams_its_name_and_then_its_arguments(size: int) -> None:
    *parts, last = spoken(CALL, tools_request(), size)
    calls = [part.call for part in parts if part.call is not None]
    assert len(calls) == len(parts)
    assert [call.name for call in calls] == ["get_weather"] + [None] * (len(calls) - 1)
    assert json.loads("".join(call.arguments for call in calls)) == {"location": "Paris"}
    assert (last.call, last.text, last.finish_reason) == (None, "", "tool_calls")


@pytest.mark.parametrize("size", [1, 4, 100])
def test_an_answer_in_words_streams_although_there_are_tools(size: int) -> None:
    parts = spoken("  I do not {know}.", tools_request(), size)
    assert "".join(part.text for part in parts) == "  I do not {know}."
    assert [part.finish_reason for part in parts][-1] == "eos_token"
    assert all(part.call is None for part in parts)


def cut(text: str, reason: str) -> TokenEvent:
    """A text that one token makes, and that ends there."""
    token = Token(9, text, -0.5, False)
    result = dataclasses.replace(
        generation(), text=text, tokens=[token], top_tokens=[], finish_reason=reason
    )
    return TokenEvent(token, [], result)


def answered(event: TokenEvent) -> chat_answer.ChatAnswer:
    assert event.generation is not None
    return chat_answer.answer(tools_request(), event.generation, ANSWER_HEAD)


def test_a_call_that_is_cut_off_before_its_name_has_no_content() -> None:
    event = cut('{"function": {"_na', "length")
    (part,) = deltas(tools_request(), event)
    assert (part.text, part.call, part.finish_reason) == ("", None, "length")
    whole = answered(event)
    assert (whole.text, whole.calls, whole.finish_reason) == ("", (), "length")


@pytest.mark.parametrize("reason", ["length", "stop_sequence"])
@pytest.mark.parametrize("end", [-3, -8, -12])
def test_a_call_that_is_cut_off_is_the_same_whole_and_streamed(reason: str, end: int) -> None:
    event = cut(CALL[:end], reason)
    parts = deltas(tools_request(), event)
    whole = answered(event)
    (call,) = whole.calls
    assert "".join(part.call.arguments for part in parts if part.call) == call.arguments
    assert call.arguments.startswith('{"location')
    assert {part.text for part in parts} == {whole.text} == {""}
    assert (parts[-1].finish_reason, whole.finish_reason) == (reason, reason)


@pytest.mark.parametrize("form", ["tgi", "openai"])
@pytest.mark.parametrize("ended_by", ["eos_token", "stop_sequence", "length"])
@pytest.mark.parametrize(
    ("text", "is_call"), [(CALL, True), ("No.", False), (CALL[: len(CALL) // 2], False)]
)
def test_a_complete_call_is_the_reason_whatever_ended_the_text(
    form: ToolCallFormat, ended_by: str, text: str, is_call: bool
) -> None:
    wanted = tools_request(tool_call_format=form)
    expected = "tool_calls" if is_call else ended_by
    *_, last = spoken(text, wanted, ended_by=ended_by)
    assert last.finish_reason == expected
    result = dataclasses.replace(
        generation(), text=text, tokens=[Token(9, text, -0.5, False)], finish_reason=ended_by
    )
    assert chat_answer.answer(wanted, result, ANSWER_HEAD).finish_reason == expected


def test_an_answer_is_a_call_or_a_text() -> None:
    called = dataclasses.replace(generation(), text=CALL, tokens=[Token(9, CALL, -0.5, False)])
    answer = chat_answer.answer(tools_request(), called, ANSWER_HEAD)
    (call,) = answer.calls
    assert (call.name, call.arguments) == ("get_weather", '{"location": "Paris"}')
    assert chat_answer.answer(user("x"), called, ANSWER_HEAD).calls == ()
    assert chat_answer.answer(tools_request(), generation(), ANSWER_HEAD).calls == ()


def test_log_probabilities_of_the_envelope_come_with_the_next_part() -> None:
    parts = spoken(CALL, tools_request(logprobs=True), 5)
    counted = sum(len(part.logprobs or []) for part in parts)
    assert counted == len(range(0, len(CALL), 5)) + 1


@pytest.mark.parametrize(
    ("setting", "metadata", "by_contract", "expected"),
    [
        ("auto", {}, [True], "tgi"),
        ("auto", {}, [False], "openai"),
        ("auto", {}, [False, True], "tgi"),
        ("auto", {}, [], "tgi"),
        ("auto", {"x-stainless-lang": "js"}, [], "openai"),
        ("auto", {"x-stainless-lang": "python"}, [True], "openai"),
        ("tgi", {"x-stainless-lang": "python"}, [False], "tgi"),
        ("openai", {}, [True], "openai"),
        ("openai", {"x-tool-call-format": "tgi"}, [False], "tgi"),
        ("tgi", {"x-tool-call-format": "openai"}, [True], "openai"),
        ("openai", {"x-tool-call-format": "auto"}, [True], "tgi"),
        ("tgi", {"x-tool-call-format": "auto"}, [False], "openai"),
    ],
)
def test_the_form_of_calls_follows_header_setting_and_tools(
    setting: str, metadata: dict[str, str], by_contract: list[bool], expected: str
) -> None:
    tools = [Tool(name=str(index), by_contract=item) for index, item in enumerate(by_contract)]
    assert chat.tool_call_format(setting, metadata, tools) == expected


def test_another_form_of_calls_is_refused() -> None:
    with pytest.raises(ServiceError, match="Given: json"):
        chat.tool_call_format("auto", {"x-tool-call-format": "json"}, [])


def test_a_delta_has_logprobs_if_they_were_asked_for() -> None:
    wanted = request(Message(role="user", content="x"), logprobs=True)
    (part,) = deltas(wanted, TokenEvent(A, [EOS]))
    assert part.logprobs == [(A, [EOS])]


def test_reasoning_of_earlier_turns_has_both_of_its_names() -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls and m.content and m.thinking %}"
        "{{ raise_exception('both') }}{% endif %}"
        "{{ m.content }}|{{ m.reasoning_content }}|{{ m.thinking }};{% endfor %}"
    )
    thoughts = [
        Message(role="assistant", content="a", reasoning_content="b"),
        Message(role="assistant", reasoning_content="c", tool_calls=(call("{}"),)),
        Message(role="assistant", content="d", reasoning_content="e", tool_calls=(call("{}"),)),
    ]
    prompt = with_template(template).render_chat(request(*thoughts).template_messages())
    assert prompt == "a|b|b;|c|c;d|e|;"
