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

from tests.e2e.reference import ids_of, scores
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack
from tests.e2e.tools import WEATHER_QUESTION
from tests.paths import REPOSITORY
from tests.protos.node_modules import MODULES, NODE, needs_node
from tests.service.fakes import demo_ids

FOREIGN = REPOSITORY / "tests" / "e2e" / "foreign"
AGENTS, LLAMA_INDEX, LM_EVAL = (
    REPOSITORY / ".venv" / name for name in ("agents", "llama-index", "lm-eval")
)
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


@pytest.fixture(scope="module")
def scored(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval makes of its tasks, with prompts as token ids and as texts."""
    found: dict[str, Any] = run_python(
        "lm_eval", LM_EVAL, stack, tmp_path_factory.mktemp("lm-eval")
    )
    return found


def reference_score(text: str, start: int, *, begins: bool) -> tuple[float, bool]:
    """The log-probability of a text after its first characters, and whether it is the likeliest.

    `begins` says whether a token for the beginning of the text stands before it.
    """
    token_ids = ids_of(text) if begins else demo_ids(text)
    first = len(ids_of(text[:start])) if begins else len(demo_ids(text[:start]))
    rows = scores(token_ids)[first - 1 : -1]
    wanted = token_ids[first:]
    total = sum(float(row[token_id]) for row, token_id in zip(rows, wanted, strict=True))
    return total, rows.argmax(-1).tolist() == wanted


def test_pydantic_ai(stack: Stack, answer: str, tmp_path: Path) -> None:
    found = run_python("pydantic_ai", AGENTS, stack, tmp_path)
    assert found["text"] == found["stream"] == answer
    assert found["asked"] == ["Paris"]
    assert "20" in found["tool answer"]
    assert found["structured"] == {"city": "Paris"}


def test_openai_agents(stack: Stack, answer: str, tmp_path: Path) -> None:
    apis = run_python("openai_agents", AGENTS, stack, tmp_path)
    assert apis["responses"].pop("model") == "OpenAIResponsesModel"
    for found in apis.values():
        assert found["text"] == answer
        assert found["asked"] == ["Paris", "Paris"]
        assert "20" in found["tool answer"]
        assert found["streamed answer"] == found["tool answer"]
        assert {"raw_response_event", "run_item_stream_event"} <= set(found["kinds"])
        assert found["typed"] == "City"
        assert found["typed with tool"] == [["Paris", "Weather"]] * 2


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


@pytest.mark.parametrize("prompts", ["ids", "ids after the beginning", "texts"])
def test_lm_eval(stack: Stack, scored: dict[str, Any], prompts: str) -> None:
    found = scored[prompts]
    begins = prompts != "ids"
    assert found["accuracy"] > 0.5  # of three; the model is small
    for text, start, score, is_greedy in found["scores"]:
        expected, expected_greedy = reference_score(text, start, begins=begins)
        assert score == pytest.approx(expected, abs=0.02)
        assert is_greedy == expected_greedy
    for question, text in found["texts"] if begins else ():
        whole = stack.generate(question, max_new_tokens=8)["generated_text"]
        assert text == whole.partition("\n")[0]


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
