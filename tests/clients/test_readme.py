"""The examples of the client's README run as they stand."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenwire_client import Client

from service.access.certificates import TlsFiles, server_credentials
from service.access.keys import key_line, parse_keys
from service.api.authentication import Authenticator
from tests.certificates import Authority
from tests.clients.conftest import CLIENT, Served
from tests.service.api.harness import TEXT, Service
from tests.service.fakes import SERVER, listening


def examples() -> list[str]:
    return re.findall("```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.S)


async def test_the_examples_run(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = examples()
    names: dict[str, Any] = {}
    await asyncio.to_thread(exec, first.replace("127.0.0.1:50051", served.address), names)
    assert capsys.readouterr().out.count(TEXT) == 3

    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(second.replace("127.0.0.1:50051", served.address), "README", "exec", flags)
    running = eval(code, names)
    assert inspect.isawaitable(running)
    await running
    assert capsys.readouterr().out == TEXT


async def test_the_example_with_key_and_certificates_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = Authority(tmp_path)
    server, client = authority.issue("server", "DNS:localhost"), authority.issue("client")
    shutil.copyfile(client.certificate, tmp_path / "client.pem")
    shutil.copyfile(client.key, tmp_path / "client.key")
    monkeypatch.chdir(tmp_path)
    keys = parse_keys(key_line("alice", "tw-secret"))
    service = Service()
    async with listening(
        service.handlers(),
        service.metrics,
        credentials=server_credentials(
            TlsFiles(server.certificate, server.key, authority.certificate)
        ),
        authenticator=Authenticator(lambda: keys),
    ) as port:
        *_, example = examples()
        code = example.replace("tokenwire.example:50051", f"localhost:{port}")
        await asyncio.to_thread(exec, code, {"Client": Client})
    assert capsys.readouterr().out == f"{SERVER.model_id}\n"
