"""The prompt of a conversation with tools, and the answer from the result of a tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.openai.tools import DEFAULT_TOOL_PROMPT
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import Stack, running
from tests.e2e.tool_calls import ARGUMENTS, WANTED, answered, choice, post, templated
from tests.e2e.tools import TOOLS, WEATHER_QUESTION
from tests.paths import REPOSITORY


class TestPrompt:
    def test_template_decides_where_the_tools_are(self, stack: Stack) -> None:
        prompt = templated(stack)
        assert all(item["function"]["name"] in prompt for item in TOOLS)
        assert DEFAULT_TOOL_PROMPT not in prompt

    def test_tool_prompt_follows_the_last_message(self, stack: Stack) -> None:
        prompt = templated(stack, tool_prompt="Use these functions:")
        start = prompt.index(f"{WEATHER_QUESTION}\n---\nUse these functions:\n") + len(
            f"{WEATHER_QUESTION}\n---\nUse these functions:\n"
        )
        schema, _ = json.JSONDecoder().raw_decode(prompt[start:])
        assert schema["required"] == ["function"]

    def test_default_tool_prompt_is_added_if_the_template_has_no_tools(
        self, tmp_path: Path
    ) -> None:
        config = json.loads((REPOSITORY / "models/demo/tokenizer_config.json").read_text())
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**config, "chat_template": template}))
        with running(tmp_path / "log", f"--tokenizer-config-path={path}") as server:
            start = f"<user>{WEATHER_QUESTION}\n---\n{DEFAULT_TOOL_PROMPT}\n" + '{"type": "object"'
            assert templated(server).startswith(start)
            parts: Any = [{"role": "user", "content": [{"type": "text", "text": WEATHER_QUESTION}]}]
            assert templated(server, messages=parts).startswith(start)
            mine = templated(server, tool_prompt="Mine:")
            assert mine.startswith(f"<user>{WEATHER_QUESTION}\n---\nMine:\n" + '{"type": "object"')
            assert templated(server, tool_choice="none") == f"<user>{WEATHER_QUESTION}<assistant>"
            assert choice(post(server, tool_choice="get_time", max_tokens=12))["message"]

    def test_spelling_of_arguments_does_not_change_the_prompt(self, stack: Stack) -> None:
        prompts = {templated(stack, messages=answered(form)) for form in ARGUMENTS}
        assert len(prompts) == 1
        assert '{"_name": "get_weather", "location": "Paris"}' in prompts.pop()


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_tool_result_is_answered(stack: Stack, api: ReflectionClient, arguments: Any) -> None:
    messages = answered(arguments)
    answer = choice(post(stack, messages=messages))
    assert "20" in answer["message"]["content"]
    (reply,) = api.collect("Chat", {**WANTED, "messages": messages})
    assert reply.completion.choices[0].message.content == answer["message"]["content"]
