"""Servers of tiny models with the tokenizers of real ones: vocabularies of 128,000 to 262,145."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import regex
from tokenizers import Tokenizer

from tests.e2e.stack import Stack, running
from tests.tokenizers.checkpoints import VOCAB_SIZES, folder, make_checkpoint, names

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "city": {"enum": ["Zürich", "東京", "<|eot_id|>", "😀 <end_of_turn>"]},
        "count": {"type": "integer", "minimum": -5, "maximum": 120},
    },
    "required": ["name", "city", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    path = tmp_path_factory.mktemp(name)
    with running(path / "log", f"--model-id={make_checkpoint(name, path / 'model')}") as server:
        yield server


def test_a_schema_is_enforced(server: Stack) -> None:
    for seed in range(3):
        details = server.generate(
            grammar={"type": "json", "value": SCHEMA}, max_new_tokens=100, seed=seed, do_sample=True
        )
        assert details["details"]["finish_reason"] == "eos_token"
        jsonschema.validate(json.loads(details["generated_text"]), SCHEMA)
    assert "no grammars" not in server.log()


@pytest.mark.parametrize("pattern", ["(Grüße|日本|😀|\\n){2,3}", "[0-9]{3}-[a-f]+x", "<(eos|bos)>"])
def test_a_regular_expression_is_enforced(server: Stack, pattern: str) -> None:
    text = server.generate(
        grammar={"type": "regex", "value": pattern}, max_new_tokens=100, seed=1, do_sample=True
    )["generated_text"]
    assert regex.fullmatch(pattern, text) or regex.fullmatch(pattern, text, partial=True)


def test_a_text_comes_back_as_it_is(server: Stack) -> None:
    text = "Ünïcödé 日本語 😀👍🏽 \t\n\n  def f(x): return {'a': 1}"
    const = {"type": "json", "value": {"const": text}}
    generated = server.generate(grammar=const, max_new_tokens=200)["generated_text"]
    assert json.loads(generated) == text


def test_a_token_that_only_the_tokenizer_has_is_refused(server: Stack, name: str) -> None:
    ids = Tokenizer.from_file(str(folder(name) / "tokenizer.json")).get_vocab()
    lacking = [piece for piece, token_id in ids.items() if token_id >= VOCAB_SIZES[name]]
    assert bool(lacking) == (name == "gemma3")
    for piece in lacking:
        reply = server.http.post("/generate", json={"inputs": f"Look: {piece}"})
        assert reply.status_code == 422, reply.text
        assert reply.json()["error_type"] == "validation"
        assert str(VOCAB_SIZES[name]) in reply.json()["error"]
    server.generate("Look:")
