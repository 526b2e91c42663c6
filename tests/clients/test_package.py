"""The client as a wheel, which needs nothing of the server; and its generated code."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from protos.generate import CLIENT_OUTPUT, generate_client
from tests.clients.conftest import CLIENT, Served
from tests.service.api.harness import PROMPT, TEXT

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
SCRIPT = f"""
import sys
import tokenwire_client
from tokenwire_client import Client

with Client(sys.argv[1]) as client:
    sys.stdout.buffer.write(client.generate({PROMPT!r}).generated_text.encode())
heavy = {{"torch", "betterproto2", "transformers", "service", "engine"}} & sys.modules.keys()
assert not heavy, heavy
assert tokenwire_client.__file__.startswith(sys.argv[2]), tokenwire_client.__file__
"""

TYPED = """
from tokenwire_client import AsyncClient, Client
from tokenwire_client.messages import ChatCompletion

def use(client: Client) -> ChatCompletion:
    messages = [{"role": "user", "content": "hello"}]
    for event in client.generate_stream("hello", max_new_tokens=3, stop=["x"]):
        text: str = event.token.text
    return client.chat(messages, max_tokens=3, response_format={"type": "json_object"})

async def use_async(client: AsyncClient) -> str:
    async for chunk in client.chat_stream([{"role": "user", "content": "hello"}]):
        return chunk.choices[0].delta.content
    return (await client.generate("hello", temperature=0.5)).generated_text
"""
MISTYPED = """
from tokenwire_client import Client

Client().generate("hello", max_tokens=3)
Client().chat([], temperature="hot")
number: int = Client().generate("hello").generated_text
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, *build, str(CLIENT)], check=True)
    (path,) = folder.glob("tokenwire_client-*-py3-none-any.whl")
    return path


def test_it_needs_grpc_and_protobuf_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (item for item in archive.namelist() if item.endswith("/METADATA"))
        needed = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    assert needed is not None
    names = {item.split(">")[0] for item in needed}
    assert names == {"grpcio", "protobuf", "googleapis-common-protos"}


def test_it_is_typed_and_has_a_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {"py.typed", "LICENSE", "client.py", "aio.py", "pb/chat_pb2.py", "pb/chat_pb2.pyi"}
    assert {f"tokenwire_client/{name}" for name in files} <= names


async def test_installed_alone_it_calls_a_server(
    wheel: Path, served: Served, tmp_path: Path
) -> None:
    target = tmp_path / "installed"
    install = [*PIP, "install", "--no-deps", "--target", str(target), str(wheel)]
    await asyncio.to_thread(subprocess.run, install, check=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", SCRIPT, served.address, str(target)),
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    output, _ = await process.communicate()
    assert (process.returncode, output.decode()) == (0, TEXT)


def type_check(code: str, folder: Path) -> str:
    """What mypy finds wrong with a program that uses the client."""
    program = folder / "program.py"
    program.write_text(code)
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(program)],
        env={**os.environ, "MYPYPATH": str(CLIENT / "src")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return "".join(line for line in ended.stdout.splitlines(True) if line.startswith("program.py"))


def test_programs_that_use_it_type_check(tmp_path: Path) -> None:
    assert type_check(TYPED, tmp_path) == ""


def test_mistakes_of_programs_are_found_by_type_checkers(tmp_path: Path) -> None:
    found = type_check(MISTYPED, tmp_path)
    lines = [line.split(":")[1] for line in found.splitlines() if ": error:" in line]
    assert lines == ["4", "5", "6"]


def test_the_generated_code_is_up_to_date(tmp_path: Path) -> None:
    generate_client(tmp_path / "pb")
    fresh, committed = contents(tmp_path / "pb"), contents(CLIENT_OUTPUT)
    assert fresh.keys() == committed.keys()
    stale = [name for name, content in fresh.items() if committed[name] != content]
    assert stale == [], "run protos/generate.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
