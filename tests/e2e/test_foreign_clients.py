"""Frameworks for agents, and clients in JavaScript, unmodified, against the real server.

Each has a script in `foreign`, which prints what it found as one JSON document, and is run with
packages of its own, which `make test` installs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import DEADLINE_S, PROMPT, Stack
from tests.e2e.tools import WEATHER_QUESTION
from tests.paths import REPOSITORY
from tests.protos.node_modules import MODULES, NODE, needs_node

FOREIGN = REPOSITORY / "tests" / "e2e" / "foreign"
AGENTS, LLAMA_INDEX = (REPOSITORY / ".venv" / name for name in ("agents", "llama-index"))
CALL = ["get_weather", {"location": "Paris"}]


def output(command: list[str], stack: Stack, directory: Path, **environment: str) -> Any:
    """The JSON that a script prints, which must succeed."""
    done = subprocess.run(
        [*command, stack.url, PROMPT, WEATHER_QUESTION],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "HOME": str(directory), **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_python(name: str, packages: Path, stack: Stack, directory: Path) -> Any:
    """Runs a script that sees these packages alone."""
    if not packages.is_dir():
        pytest.fail(f"the clients are not in {packages}; `make test` installs them there")
    command = [sys.executable, "-S", str(FOREIGN / f"run_{name}.py")]
    return output(command, stack, directory, PYTHONPATH=str(packages))


def run_javascript(name: str, stack: Stack, directory: Path) -> Any:
    """Runs a script of node."""
    command = [str(NODE), str(FOREIGN / f"run_{name}.cjs")]
    return output(command, stack, directory, NODE_PATH=str(MODULES))


@pytest.fixture(scope="module")
def answer(stack: Stack) -> str:
    """What the model says to the prompt in a chat."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 100, "temperature": 0}
    reply = stack.http.post("/v1/chat/completions", json=body).json()
    text: str = reply["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def continuation(stack: Stack) -> str:
    """How the model goes on after the prompt."""
    text: str = stack.generate(max_new_tokens=100)["generated_text"]
    return text


def test_pydantic_ai(stack: Stack, answer: str, tmp_path: Path) -> None:
    found = run_python("pydantic_ai", AGENTS, stack, tmp_path)
    assert found["text"] == found["stream"] == answer
    assert found["asked"] == ["Paris"]
    assert "20" in found["tool answer"]
    assert found["structured"] == {"city": "Paris"}


def test_openai_agents(stack: Stack, answer: str, tmp_path: Path) -> None:
    found = run_python("openai_agents", AGENTS, stack, tmp_path)
    assert found["text"] == answer
    assert found["asked"] == ["Paris", "Paris"]
    assert "20" in found["tool answer"]
    assert found["streamed answer"] == found["tool answer"]
    assert {"raw_response_event", "run_item_stream_event"} <= set(found["kinds"])


def test_instructor(stack: Stack, tmp_path: Path) -> None:
    found = run_python("instructor", AGENTS, stack, tmp_path)
    assert found == {"tool_call": {"city": "Paris"}, "json_schema_mode": {"city": "Paris"}}


def test_litellm(stack: Stack, answer: str, continuation: str, tmp_path: Path) -> None:
    found = run_python("litellm", AGENTS, stack, tmp_path)
    assert found["text"] == found["stream"] == answer
    assert found["reason"] == "stop"
    assert found["calls"] == [CALL, CALL]
    assert found["call reasons"] == ["tool_calls", "tool_calls"]
    assert found["completion"] == continuation


def test_langchain_huggingface(
    stack: Stack, answer: str, continuation: str, tmp_path: Path
) -> None:
    found = run_python("langchain_huggingface", AGENTS, stack, tmp_path)
    assert found["text"] == continuation
    assert found["chat"] == found["stream"] == answer
    assert found["calls"] == [CALL]


def test_llama_index(stack: Stack, answer: str, continuation: str, tmp_path: Path) -> None:
    found = run_python("llama_index", LLAMA_INDEX, stack, tmp_path)
    assert found["chat"] == found["stream"] == answer
    assert found["completion"] == continuation
    assert found["calls"] == [CALL]


@needs_node("openai")
def test_openai_in_javascript(stack: Stack, answer: str, tmp_path: Path) -> None:
    found = run_javascript("openai", stack, tmp_path)
    name = stack.http.get("/info").json()["model_id"]
    assert found["models"] == [name, name]
    assert found["text"] == found["stream"] == answer
    assert found["calls"] == [CALL, CALL]


@needs_node("ai", "@ai-sdk/openai-compatible", "zod")
def test_ai_sdk(stack: Stack, answer: str, tmp_path: Path) -> None:
    found = run_javascript("ai_sdk", stack, tmp_path)
    assert found["text"] == found["stream"] == answer
    assert found["asked"] == ["Paris", "Paris"]
    assert "20" in found["answer"]
    assert found["streamedAnswer"] == found["answer"]
    assert found["object"] == {"city": "Paris"}


@needs_node("@huggingface/inference")
def test_huggingface_inference_in_javascript(
    stack: Stack, answer: str, continuation: str, tmp_path: Path
) -> None:
    found = run_javascript("hf_inference", stack, tmp_path)
    assert found["stream"].removesuffix("<|end|>") == continuation  # TGI sends its text, too
    assert found["text"] == continuation
    assert found["chat"] == found["chatStream"] == answer
