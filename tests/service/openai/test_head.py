"""What answers begin with."""

from __future__ import annotations

import re

import pytest

from service.openai.head import Head
from tests.service.fakes import SERVER


def echoed(name: str | None) -> str:
    return Head.begin("cmpl-", name, SERVER).model


def test_every_answer_has_an_id_of_its_own() -> None:
    ids = {Head.begin("chatcmpl-", None, SERVER).id for _ in range(50)}
    assert len(ids) == 50
    assert all(re.fullmatch("chatcmpl-[0-9a-f]{32}", item) for item in ids)


@pytest.mark.parametrize("name", ["gpt-4o", "org/name", "TGI", "模型", "x" * 256])
def test_name_in_the_request_is_the_name_in_the_answer(name: str) -> None:
    assert echoed(name) == name


@pytest.mark.parametrize("name", [None, "", "tgi", "x" * 257, "x" * 1_000_000])
def test_otherwise_the_model_has_its_own_name(name: str | None) -> None:
    assert echoed(name) == SERVER.model_id
