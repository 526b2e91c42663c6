"""The table of architectures is true: a sample of it is tried, and every one has a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.models import Result, make_prompts, served, try_out, write
from tests.engine.native import threads
from tests.on_demand import ALL_MODELS
from tests.paths import REPOSITORY


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


# One of each kind: of attention, of positions, of experts, of image parts, and of refusals.
SAMPLE = (
    "Llama 3.1",
    "Llama 4 with images",
    "Qwen 3 MoE",
    "Qwen 3 Next",
    "Qwen 2.5 VL",
    "Gemma 3n",
    "Gemma 4 with images",
    "Ministral 3 with images",
    "Phi 3, 4 with longrope",
    "gpt-oss",
    "DeepSeek V3, R1",
    "DeepSeek V3.2",
    "GLM 4.5V",
    "Granite 4 without Mamba layers",
    "Granite 4 hybrid",
    "HunYuan MoE",
    "MiMo V2 Flash",
    "Trinity (AFMoE)",
    "Nemotron 3, Minitron",
    "StableLM",
    "Falcon 7B",
    "BLOOM",
    "LFM 2",
    "Kimi K2.5 with images",
    "LLaVA",
    "PaliGemma",
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def rows() -> dict[str, str]:
    """The rows of the document, by the model's name."""
    lines = (REPOSITORY / "docs" / "models.md").read_text().splitlines()
    table = lines[lines.index(models._HEADER) + 2 :]
    end = next(index for index, line in enumerate(table) if not line.startswith("|"))
    return {line.split(" | ")[0].removeprefix("| "): line for line in table[:end]}


def test_the_table_has_every_architecture_and_none_answers_otherwise() -> None:
    assert list(rows()) == list(BY_NAME)
    assert not [row for row in rows().values() if "other tokens" in row]


@pytest.mark.parametrize("name", BY_NAME if ALL_MODELS else SAMPLE)
def test_a_row_says_what_happens(name: str) -> None:
    result = try_out(BY_NAME[name])
    assert result.row == rows()[name]


def test_texts_are_long_enough_and_decisive() -> None:
    """Prompts exceed a step and every threshold, and the tokens of one are not those of another."""
    prompts = make_prompts()
    assert sum(map(len, prompts)) > models._STEP_TOKENS
    assert min(map(len, prompts)) > 32
    tokens, _ = served(BY_NAME["Llama 2, 3"], prompts)
    assert len({*tokens[0], *tokens[1]}) > 20
    assert tokens[0] != tokens[1]


def test_other_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "continued", lambda model, prompt: [0] * models.NUM_NEW_TOKENS)
    assert try_out(BY_NAME["Llama 2, 3"]).outcome == "other tokens"


def test_results_replace_their_rows_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "models.md"
    ruler = "|---|---|---|"
    path.write_text(f"Text.\n\n{models._HEADER}\n{ruler}\n| OLMo | `Olmo` | old |\n\nMore.\n")
    write(path, [Result("Llama 2, 3", "Llama", "same tokens", "", 0.1)])
    assert path.read_text() == (
        f"Text.\n\n{models._HEADER}\n{ruler}\n"
        "| Llama 2, 3 | `Llama` | same tokens |\n| OLMo | `Olmo` | old |\n\nMore.\n"
    )


def test_a_document_without_a_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "other.md"
    path.write_text("Text.\n")
    with pytest.raises(SystemExit, match="has no table"):
        write(path, [])


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(ARCHITECTURES)
    assert all(isinstance(architecture, Architecture) for architecture in ARCHITECTURES)
