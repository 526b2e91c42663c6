"""Clients of TGI and of OpenAI, unmodified, against the real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError
from openai import APIError, AsyncOpenAI, NotFoundError, OpenAI, UnprocessableEntityError

from tests.e2e.stack import DEADLINE_S, PROMPT, Stack
from tests.paths import REPOSITORY

MESSAGES: Any = [{"role": "user", "content": PROMPT}]
TGI_CLIENT = REPOSITORY / ".venv" / "tgi-client"


@pytest.fixture(scope="module")
def hub(stack: Stack) -> InferenceClient:
    return InferenceClient(stack.url, timeout=DEADLINE_S)


@pytest.fixture
def openai(stack: Stack) -> Any:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="-", timeout=DEADLINE_S) as client:
        yield client


def chat_text(stack: Stack) -> str:
    """The greedy answer over plain HTTP, which the clients must return."""
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0.0}
    text: str = stack.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"][
        "content"
    ]
    return text


class TestHuggingFaceHub:
    def test_text_generation(self, stack: Stack, hub: InferenceClient) -> None:
        text = hub.text_generation(PROMPT, max_new_tokens=6, return_full_text=False)
        assert text == stack.generate(max_new_tokens=6)["generated_text"]

    def test_text_generation_with_details(self, stack: Stack, hub: InferenceClient) -> None:
        expected = stack.generate(max_new_tokens=6, decoder_input_details=True, top_n_tokens=2)
        output = hub.text_generation(
            PROMPT,
            details=True,
            max_new_tokens=6,
            decoder_input_details=True,
            top_n_tokens=2,
            return_full_text=False,
        )
        assert output.generated_text == expected["generated_text"]
        assert output.details is not None
        assert output.details.finish_reason == expected["details"]["finish_reason"]
        assert [token.id for token in output.details.tokens] == [
            token["id"] for token in expected["details"]["tokens"]
        ]
        assert [token.logprob for token in output.details.prefill] == [
            token["logprob"] for token in expected["details"]["prefill"]
        ]
        assert output.details.top_tokens

    def test_prompt_is_echoed_by_default(self, stack: Stack, hub: InferenceClient) -> None:
        text = hub.text_generation(PROMPT, max_new_tokens=6)
        assert text == PROMPT + stack.generate(max_new_tokens=6)["generated_text"]

    def test_seeded_text_generation(self, stack: Stack, hub: InferenceClient) -> None:
        parameters: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "seed": 4, "top_k": 50}
        text = hub.text_generation(PROMPT, max_new_tokens=6, return_full_text=False, **parameters)
        assert text == stack.generate(max_new_tokens=6, **parameters)["generated_text"]

    def test_stream(self, stack: Stack, hub: InferenceClient) -> None:
        expected = stack.generate(max_new_tokens=6)
        stream = hub.text_generation(PROMPT, max_new_tokens=6, stream=True)
        assert "".join(stream) == "".join(
            token["text"] for token in expected["details"]["tokens"] if not token["special"]
        )

    def test_stream_with_details(self, stack: Stack, hub: InferenceClient) -> None:
        stream = hub.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True)
        *others, last = list(stream)
        expected = stack.generate(max_new_tokens=6)["details"]
        assert [item.token.id for item in (*others, last)] == [t["id"] for t in expected["tokens"]]
        assert last.details is not None
        assert last.details.finish_reason == expected["finish_reason"]
        assert all(item.details is None for item in others)

    def test_chat_completion(self, stack: Stack, hub: InferenceClient) -> None:
        output = hub.chat_completion(MESSAGES, max_tokens=6, temperature=0.0)
        (choice,) = output.choices
        assert choice.message.content == chat_text(stack)
        assert choice.message.role == "assistant"
        assert output.usage is not None
        assert output.usage.completion_tokens > 0

    def test_chat_completion_with_logprobs(self, hub: InferenceClient) -> None:
        output = hub.chat_completion(MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2)
        logprobs = output.choices[0].logprobs
        assert logprobs is not None
        assert all(len(item.top_logprobs) >= 2 for item in logprobs.content)

    def test_chat_stream(self, stack: Stack, hub: InferenceClient) -> None:
        stream = hub.chat_completion(MESSAGES, max_tokens=6, temperature=0.0, stream=True)
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == chat_text(stack)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")

    def test_openai_style_methods(self, stack: Stack, hub: InferenceClient) -> None:
        output = hub.chat.completions.create(messages=MESSAGES, max_tokens=6, temperature=0.0)
        assert output.choices[0].message.content == chat_text(stack)

    def test_endpoint_info_and_health(self, stack: Stack) -> None:
        client = InferenceClient(stack.url, provider="hf-inference")
        if hasattr(client, "get_endpoint_info"):
            assert client.get_endpoint_info()["router"] == "text-generation-router"
        if hasattr(client, "health_check"):
            assert client.health_check() is True

    def test_validation_error_has_the_text(self, hub: InferenceClient) -> None:
        with pytest.raises(ValidationError, match="`max_new_tokens` must be strictly positive"):
            hub.text_generation(PROMPT, max_new_tokens=0)

    def test_error_in_a_stream_is_raised(self, hub: InferenceClient) -> None:
        with pytest.raises(ValidationError, match="`top_p` must be > 0"):
            list(hub.text_generation(PROMPT, max_new_tokens=2, top_p=1.5, stream=True))

    async def test_async(self, stack: Stack) -> None:
        async with AsyncInferenceClient(stack.url, timeout=DEADLINE_S) as client:
            text = await client.text_generation(PROMPT, max_new_tokens=6, return_full_text=False)
            assert text == stack.generate(max_new_tokens=6)["generated_text"]
            stream = await client.chat_completion(
                MESSAGES, max_tokens=6, temperature=0.0, stream=True
            )
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(parts) == chat_text(stack)


class TestOpenAI:
    def test_chat(self, stack: Stack, openai: OpenAI) -> None:
        output = openai.chat.completions.create(
            model="tgi", messages=MESSAGES, max_tokens=6, temperature=0.0
        )
        assert output.object == "chat.completion"
        assert output.choices[0].message.content == chat_text(stack)
        assert output.usage is not None
        assert output.usage.total_tokens > output.usage.prompt_tokens > 0

    def test_chat_with_logprobs(self, openai: OpenAI) -> None:
        output = openai.chat.completions.create(
            model="tgi", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, seed=5
        )
        logprobs = output.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content
        assert all(item.logprob <= 0 for item in logprobs.content)

    def test_chat_stream(self, stack: Stack, openai: OpenAI) -> None:
        stream = openai.chat.completions.create(
            model="tgi", messages=MESSAGES, max_tokens=6, temperature=0.0, stream=True
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat_text(stack)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")

    def test_chat_takes_a_single_stop_string(self, openai: OpenAI) -> None:
        output = openai.chat.completions.create(
            model="tgi", messages=MESSAGES, max_tokens=3, stop="never in any text"
        )
        assert output.choices[0].finish_reason in ("length", "stop")

    def test_chat_stream_with_usage(self, openai: OpenAI) -> None:
        wanted: dict[str, Any] = {"model": "tgi", "messages": MESSAGES, "max_tokens": 6}
        whole = openai.chat.completions.create(**wanted, temperature=0.0)
        stream = openai.chat.completions.create(
            **wanted, temperature=0.0, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
            whole.choices[0].message.content
        )
        assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
        assert (last.choices, last.usage) == ([], whole.usage)

    def test_completion_stream_with_usage(self, openai: OpenAI) -> None:
        wanted: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "max_tokens": 6}
        whole = openai.completions.create(**wanted, temperature=0.0)
        stream = openai.completions.create(
            **wanted, temperature=0.0, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
        assert (last.choices, last.usage) == ([], whole.usage)

    def test_max_completion_tokens_wins_over_max_tokens(self, openai: OpenAI) -> None:
        output = openai.chat.completions.create(
            model="tgi",
            messages=MESSAGES,
            max_completion_tokens=2,
            max_tokens=6,
            temperature=0.0,
        )
        assert output.choices[0].finish_reason == "length"
        assert output.usage is not None
        assert output.usage.completion_tokens == 2

    def test_models(self, stack: Stack, openai: OpenAI) -> None:
        (model,) = openai.models.list()
        assert model.object == "model"
        assert model.id == stack.http.get("/info").json()["model_id"]

    def test_model_is_retrieved_by_its_name(self, openai: OpenAI) -> None:
        (listed,) = openai.models.list()
        assert openai.models.retrieve(listed.id) == listed
        with pytest.raises(NotFoundError, match="The model `org/other` does not exist"):
            openai.models.retrieve("org/other")

    def test_unknown_chat_fields_are_ignored(self, openai: OpenAI) -> None:
        stream = openai.chat.completions.create(
            model="tgi",
            messages=MESSAGES,
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": False},
            user="user-1",
        )
        assert list(stream)

    def test_completion(self, stack: Stack, openai: OpenAI) -> None:
        output = openai.completions.create(
            model="tgi", prompt=PROMPT, max_tokens=6, temperature=0.0
        )
        assert output.choices[0].text == stack.generate(max_new_tokens=6)["generated_text"]

    def test_completion_of_several_prompts(self, stack: Stack, openai: OpenAI) -> None:
        prompts = [PROMPT, "One, two,", "The sea is"]
        output = openai.completions.create(
            model="tgi", prompt=prompts, max_tokens=4, temperature=0.0
        )
        found = {choice.index: choice.text for choice in output.choices}
        assert found == {
            index: stack.generate(prompt, max_new_tokens=4)["generated_text"]
            for index, prompt in enumerate(prompts)
        }

    def test_completion_stream_of_several_prompts(self, stack: Stack, openai: OpenAI) -> None:
        prompts = [PROMPT, "One, two,"]
        stream = openai.completions.create(
            model="tgi", prompt=prompts, max_tokens=4, temperature=0.0, stream=True
        )
        texts = {0: "", 1: ""}
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        for index, prompt in enumerate(prompts):
            text = stack.generate(prompt, max_new_tokens=4)["generated_text"]
            assert texts[index].startswith(text)

    def test_error_has_status_and_text(self, openai: OpenAI) -> None:
        with pytest.raises(UnprocessableEntityError) as caught:
            openai.chat.completions.create(model="tgi", messages=MESSAGES, max_tokens=0)
        assert caught.value.status_code == 422
        assert caught.value.code == "validation"

    def test_error_in_a_stream_is_raised(self, openai: OpenAI) -> None:
        stream = openai.chat.completions.create(
            model="tgi", messages=MESSAGES, max_tokens=0, stream=True
        )
        with pytest.raises(APIError):
            list(stream)

    async def test_async(self, stack: Stack) -> None:
        async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="-") as client:
            stream = await client.chat.completions.create(
                model="tgi", messages=MESSAGES, max_tokens=6, temperature=0.0, stream=True
            )
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(parts) == chat_text(stack)


# Runs with the packages of the old client; prints the answers as JSON.
TGI_SCRIPT = """
import asyncio, json, sys, warnings
warnings.simplefilter("ignore")
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

url, prompt = sys.argv[1:]
messages = [{"role": "user", "content": prompt}]
client = Client(url, timeout=120)
found = {}

whole = client.generate(prompt, max_new_tokens=6, decoder_input_details=True, top_n_tokens=2)
found["generate"] = {
    "text": whole.generated_text,
    "ids": [token.id for token in whole.details.tokens],
    "logprobs": [token.logprob for token in whole.details.tokens],
    "prefill": [token.logprob for token in whole.details.prefill],
    "reason": whole.details.finish_reason.value,
    "seed": whole.details.seed,
    "tops": [len(step) for step in whole.details.top_tokens],
}
best = client.generate(prompt, max_new_tokens=3, do_sample=True, best_of=2)
found["best_of"] = len(best.details.best_of_sequences)
events = list(client.generate_stream(prompt, max_new_tokens=6))
found["generate_stream"] = {
    "ids": [event.token.id for event in events],
    "text": events[-1].generated_text,
    "reason": events[-1].details.finish_reason.value,
}
chat = client.chat(messages, max_tokens=6, temperature=0.0)
found["chat"] = chat.choices[0].message.content
try:
    client.generate(prompt, max_new_tokens=5000)
except ValidationError as error:
    found["error"] = str(error)
try:
    list(client.generate_stream(prompt, max_new_tokens=5000))
except ValidationError as error:
    found["stream_error"] = str(error)


async def main():
    client = AsyncClient(url, timeout=120)
    whole = await client.generate(prompt, max_new_tokens=6)
    events = [event async for event in client.generate_stream(prompt, max_new_tokens=6)]
    chat = await client.chat(messages, max_tokens=6, temperature=0.0)
    return {
        "generate": whole.generated_text,
        "generate_stream": events[-1].generated_text,
        "chat": chat.choices[0].message.content,
    }


found["async"] = asyncio.run(main())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(stack: Stack) -> dict[str, Any]:
    """What `TGI_SCRIPT` printed."""
    if not TGI_CLIENT.is_dir():
        pytest.fail(
            f"the client text-generation is not in {TGI_CLIENT}; `make test` installs it there, "
            "since it needs other versions than the rest: requirements-tgi-client.lock"
        )
    done = subprocess.run(
        [sys.executable, "-S", "-c", TGI_SCRIPT, stack.url, PROMPT],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(TGI_CLIENT)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class TestTextGeneration:
    def test_generate(self, stack: Stack, found: dict[str, Any]) -> None:
        expected = stack.generate(max_new_tokens=6, decoder_input_details=True, top_n_tokens=2)
        details = expected["details"]
        assert found["generate"] == {
            "text": expected["generated_text"],
            "ids": [token["id"] for token in details["tokens"]],
            "logprobs": [token["logprob"] for token in details["tokens"]],
            "prefill": [token["logprob"] for token in details["prefill"]],
            "reason": details["finish_reason"],
            "seed": None,
            "tops": [len(step) for step in details["top_tokens"]],
        }

    def test_best_of(self, found: dict[str, Any]) -> None:
        assert found["best_of"] == 1

    def test_generate_stream(self, stack: Stack, found: dict[str, Any]) -> None:
        expected = stack.generate(max_new_tokens=6)
        assert found["generate_stream"] == {
            "ids": [token["id"] for token in expected["details"]["tokens"]],
            "text": expected["generated_text"],
            "reason": expected["details"]["finish_reason"],
        }

    def test_chat(self, stack: Stack, found: dict[str, Any]) -> None:
        assert found["chat"] == chat_text(stack)

    def test_errors(self, found: dict[str, Any]) -> None:
        assert "`inputs` tokens + `max_new_tokens` must be <= " in found["error"]
        assert found["stream_error"] == found["error"]

    def test_async(self, stack: Stack, found: dict[str, Any]) -> None:
        text = stack.generate(max_new_tokens=6)["generated_text"]
        assert found["async"] == {
            "generate": text,
            "generate_stream": text,
            "chat": chat_text(stack),
        }
