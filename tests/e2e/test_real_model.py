"""A real model of a GGUF file: its tokenizer, its template and its English, through Envoy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from service.checkpoint.path import resolve
from tests.e2e.stack import DEADLINE_S, TOKENWIRE, Stack, running
from tests.paths import REPOSITORY
from tests.real_model import real_model

README = (REPOSITORY / "README.md").read_text()
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time, there was a little girl who"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = (f"--model-id={real_model()}", "--max-total-tokens=1024")
    with running(tmp_path_factory.mktemp("model") / "log", *flags) as server:
        yield server


@pytest.fixture
def client(server: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, messages: Any = QUESTION, **more: Any) -> Any:
    return client.chat.completions.create(
        model="tgi", messages=messages, max_tokens=100, temperature=0, **more
    )


def test_it_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    (choice,) = ask(client).choices
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"


def test_a_stream_has_the_text_of_the_whole(client: openai.OpenAI) -> None:
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == ask(client).choices[0].message.content


def test_the_templates_own_words_are_in_the_prompt(client: openai.OpenAI) -> None:
    alone = ask(client).usage.prompt_tokens
    told = ask(client, [{"role": "system", "content": "Be brief."}, *QUESTION]).usage.prompt_tokens
    assert alone == 37  # with the sentence that the template begins with
    assert told < alone


def test_tokens_are_those_of_transformers(server: Stack) -> None:
    details = server.generate(STORY, max_new_tokens=30, decoder_input_details=True)["details"]
    path = real_model()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    prompt = [token["id"] for token in details["prefill"]]
    reference = model.generate(
        torch.tensor([prompt]), do_sample=False, min_new_tokens=30, max_new_tokens=30
    )
    assert [token["id"] for token in details["tokens"]] == reference[0, len(prompt) :].tolist()


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    messages = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
    content = ask(client, messages, response_format=form).choices[0].message.content
    jsonschema.validate(json.loads(content), PERSON)


def test_tools_are_called(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    (choice,) = ask(client, messages, tools=[WEATHER], tool_choice="required").choices
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert "Paris" in json.loads(call.function.arguments)["city"]


def test_one_can_chat_with_it(server: Stack) -> None:
    done = subprocess.run(
        [str(TOKENWIRE), "chat", f"--target={server.url}", "--param=temperature=0"],
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert re.search("capital of France is Paris", done.stdout)


def test_the_readme_finds_the_installed_package() -> None:
    program = re.search(r"python -c '(import importlib[^']+)'", README)
    assert program is not None
    environment = {**os.environ, "PYTHONPATH": str(real_model().parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program[1]],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert resolve(done.stdout.strip()) == str(real_model())
