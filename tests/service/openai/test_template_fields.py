"""What the chat template gets beside messages and tools, over both faces."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from service.codec import bodies, requests
from service.errors import ServiceError
from service.openai.call_formats.dialect import Dialect
from service.openai.chat import Conversation
from service.openai.template_fields import MAX_KWARGS_BYTES, TemplateFields
from service.pb.tokenwire import v1 as pb
from service.text.tokenizer import TextTokenizer
from tests.service.fakes import LIMITS
from tests.service.openai.test_chat import with_template

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{{ reasoning_effort }}|{{ enable_thinking }}|{{ documents[0].text if documents }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def prompts(tokenizer: TextTokenizer, fields: dict[str, Any]) -> list[str]:
    body = {"messages": MESSAGES, **fields}
    read = [
        requests.chat_request(msgspec.convert(body, bodies.Chat)),
        requests.chat_request(pb.ChatRequest.parse(bytes(pb.ChatRequest.from_dict(body)))),
    ]
    return [Conversation.of(wanted, tokenizer, LIMITS, Dialect()).prompt for wanted in read]


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "||<assistant>"),
        ({"reasoning_effort": "low"}, "low||<assistant>"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "|False|<assistant>"),
        ({"documents": [{"text": "d"}]}, "||d<assistant>"),
        ({"add_generation_prompt": False}, "||"),
    ],
)
def test_the_template_gets_the_fields(fields: dict[str, Any], end: str) -> None:
    for prompt in prompts(with_template(TEMPLATE), fields):
        assert prompt == f"<user>hi<end><assistant>yes<end>{end}"


def test_the_final_message_is_continued() -> None:
    for prompt in prompts(with_template(TEMPLATE), {"continue_final_message": True}):
        assert prompt == "<user>hi<end><assistant>yes"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (
            TemplateFields(add_generation_prompt=True, continue_final_message=True),
            "continue_final_message",
        ),
        (TemplateFields(kwargs={"messages": []}), "chat_template_kwargs"),
        (TemplateFields(kwargs={"x": "y" * MAX_KWARGS_BYTES}), "chat_template_kwargs"),
        (TemplateFields(kwargs={"reasoning_effort": "a"}, reasoning_effort="b"),
         "reasoning_effort"),
        (TemplateFields(reasoning_effort="x" * 33), "reasoning_effort"),
        (TemplateFields(documents=("text",)), "documents"),
    ],
)  # fmt: skip
def test_impossible_fields_are_refused_by_name(fields: TemplateFields, name: str) -> None:
    with pytest.raises(ServiceError) as refused:
        fields.check()
    assert refused.value.field == name
