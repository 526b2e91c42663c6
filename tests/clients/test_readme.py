"""The examples of the client's README run as they stand."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from typing import Any

import pytest

from tests.clients.conftest import CLIENT, Served
from tests.service.api.harness import TEXT


async def test_the_examples_run(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = re.findall("```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    await asyncio.to_thread(exec, first.replace("127.0.0.1:50051", served.address), names)
    assert capsys.readouterr().out.count(TEXT) == 3

    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(second.replace("127.0.0.1:50051", served.address), "README", "exec", flags)
    running = eval(code, names)
    assert inspect.isawaitable(running)
    await running
    assert capsys.readouterr().out == TEXT
