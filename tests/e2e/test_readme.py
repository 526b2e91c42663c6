"""The client examples of the README run unchanged, apart from the address of the server."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import DEADLINE_S, Stack
from tests.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
REST_ADDRESS, GRPC_ADDRESS = "127.0.0.1:8080", "127.0.0.1:50051"

# A pattern that the output must contain; any model that answers the question says "learning".
EXPECTED = {
    "curl": r'"delta":\{"role":"assistant","content":"[^"].*data: \[DONE\].*"generated_text":"[^"]',
    "huggingface_hub": r"learning.*\n.*learning",
    "openai": "learning",
    "text-generation": "learning",
    "langchain": "learning",
    "grpcurl": r'"generatedText": ".*learning',
    "tokenwire-client": "learning",
    "grpc": "learning",
    "grpc-reflection": "learning",
}

# Clients with packages of their own, outside this environment; `make test` installs them.
OWN_PACKAGES = {
    "text-generation": REPOSITORY / ".venv" / "tgi-client",
    "langchain": REPOSITORY / ".venv" / "langchain",
}
PROGRAMS = {"curl", "grpcurl"}  # cannot be installed with pip; skipped where absent

_SECTION = re.compile(r"^## Clients\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```\w+\n.*?^```$", re.MULTILINE | re.DOTALL)
_MARKED = re.compile(
    r"^<!-- example: (\S+) -->\n```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block; the blocks of one example run one after the other."""

    example: str
    language: str
    code: str

    def at(self, stack: Stack) -> str:
        """The code with the addresses of the server under test."""
        code = self.code.replace(REST_ADDRESS, stack.address)
        return code.replace(GRPC_ADDRESS, stack.grpc_address)


def clients_section() -> str:
    """The text of the section about clients."""
    match = _SECTION.search(README)
    assert match is not None
    return match[0]


BLOCKS = [Block(*match.groups()) for match in _MARKED.finditer(clients_section())]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A writable directory with the folders of the checkout that the examples read."""
    for name in ("clients", "examples", "protos"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def run(block: Block, stack: Stack, checkout: Path) -> str:
    """Runs a block, which must succeed, and returns its output."""
    own_packages = OWN_PACKAGES.get(block.example)
    python = [sys.executable, "-S"] if own_packages else [sys.executable]
    interpreter = {"sh": ["sh", "-e"], "python": python}[block.language]
    done = subprocess.run(
        [*interpreter, "-c", block.at(stack)],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(own_packages) if own_packages else _search_path(checkout),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _search_path(checkout: Path) -> str:
    """Where the examples find generated stubs, and the client package."""
    folders = (checkout / "build" / "stubs", checkout / "clients" / "python" / "src")
    return os.pathsep.join(map(str, folders))


def test_every_fenced_block_is_run() -> None:
    section = clients_section()
    assert len(BLOCKS) == len(_FENCED.findall(section)) == section.count("\n```") / 2
    assert {block.example for block in BLOCKS} == EXPECTED.keys()


def test_no_other_section_calls_the_server() -> None:
    others = _FENCED.findall(README.replace(clients_section(), ""))
    assert [block for block in others if "127.0.0.1" in block] == []


@pytest.mark.parametrize("example", EXPECTED)
def test_example_prints_what_is_expected(stack: Stack, checkout: Path, example: str) -> None:
    if example in PROGRAMS and not shutil.which(example):
        pytest.skip(f"{example} is not on PATH")
    packages = OWN_PACKAGES.get(example)
    if packages and not packages.is_dir():
        pytest.fail(f"the packages of {example} are not in {packages}; `make test` installs them")
    blocks = [block for block in BLOCKS if block.example == example]
    assert any(block.code != block.at(stack) for block in blocks), "no address of a server"
    output = "".join(run(block, stack, checkout) for block in blocks)
    assert re.search(EXPECTED[example], output, re.DOTALL), output


def test_grpcurl_example_by_reflection(stack: Stack, direct_api: ReflectionClient) -> None:
    (block,) = (block for block in BLOCKS if block.example == "grpcurl")
    match shlex.split(block.at(stack).replace("\\\n", "")):
        case ["grpcurl", "-plaintext", "-d", request, address, symbol]:
            service, method = symbol.split("/")
            assert address == stack.grpc_address
            reply = direct_api.call(method, json.loads(request), service=service)
            assert "learning" in reply.generated_text
        case command:
            pytest.fail(f"not a request that this test understands: {command}")
