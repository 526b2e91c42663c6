"""A checker for tests, its worker processes, and the reasons for which it refuses grammars."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import psutil
import pytest

from service.errors import ErrorKind, ServiceError
from service.grammar.checker import GrammarChecker
from service.grammar.spec import Grammar
from tests.service.fakes import MODEL, TIMEOUT_S, demo_tokenizer

VOCAB_SIZE = json.loads((MODEL / "config.json").read_text())["vocab_size"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
ENDLESS = {"type": "integer", "multipleOf": 9999991}  # takes longer than a test waits

WORKER = "service.grammar.worker"


def regex(pattern: Any, **options: Any) -> Grammar:
    return Grammar(kind="regex", value=pattern, **options)


def schema(value: Any, **options: Any) -> Grammar:
    return Grammar(kind="json", value=value, **options)


def templates(parent: int | None = None) -> list[psutil.Process]:
    """The processes of which a process's workers are forked: one, or none."""
    children = psutil.Process(parent).children()
    return [child for child in children if WORKER in _command_line(child)]


def workers(parent: int | None = None) -> list[psutil.Process]:
    """The worker processes of a process."""
    forked: list[psutil.Process] = []
    for template in templates(parent):
        with suppress(psutil.NoSuchProcess):
            forked += template.children()
    return forked


def _command_line(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


# For a grammar: its process, of low priority, may get next to nothing of a busy machine.
PATIENCE_S = 10 * TIMEOUT_S


@asynccontextmanager
async def checking(**options: Any) -> AsyncGenerator[GrammarChecker]:
    tokenizer = demo_tokenizer()
    options = {"deadline_s": PATIENCE_S, "num_workers": 1, **options}
    checker = GrammarChecker(tokenizer.to_json(), VOCAB_SIZE, tokenizer.eos_token_ids, **options)
    try:
        yield checker
    finally:
        await checker.close()
        assert templates() == []


async def refusal(checker: GrammarChecker, grammar: Grammar) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        await checker.check(grammar)
    return refused.value


async def reason(checker: GrammarChecker, grammar: Grammar) -> str:
    """Why a grammar is refused, in one line."""
    error = await refusal(checker, grammar)
    assert (error.kind, error.field) == (ErrorKind.VALIDATION, "parameters.grammar")
    prefix = "Input validation error: grammar is not valid: "
    assert error.message.startswith(prefix)
    assert "\n" not in error.message
    return error.message.removeprefix(prefix)
