"""Torch's allocator gets its setting before torch is there, and the user's own stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.cuda_segments import SETTING, VARIABLE, prefer_growing_segments

OWN = "max_split_size_mb:512"
_ROOT = Path(__file__).parents[2]


def test_segments_grow_unless_the_user_says_otherwise() -> None:
    environment = {"HOME": "/home/user"}
    prefer_growing_segments(environment)
    assert environment == {"HOME": "/home/user", VARIABLE: "expandable_segments:True"}


@pytest.mark.parametrize(
    "name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"]
)
@pytest.mark.parametrize("value", [OWN, "expandable_segments:False", ""])
def test_what_the_user_sets_stays_alone(name: str, value: str) -> None:
    environment = {name: value}
    prefer_growing_segments(environment)
    assert environment == {name: value}


def test_torch_knows_the_variable_and_the_setting() -> None:
    (library,) = (Path(torch.__file__).parent / "lib").glob("libc10.*")
    content = library.read_bytes()
    name, _, value = SETTING.partition(":")
    assert value == "True", "torch takes no other spelling"
    assert all(word.encode() + b"\0" in content for word in (VARIABLE, name))


_PROGRAM = """
import os, sys
from pathlib import Path
from engine import server
from engine.protocol.config import EngineConfig

server._serve = lambda *_: print("torch" in sys.modules, os.environ.get("PYTORCH_ALLOC_CONF"))
server.build_ahead = lambda: None
server.serve(EngineConfig(model_id="none", socket_path=Path("unused"), device=sys.argv[1] or None))
"""


@pytest.mark.parametrize(
    ("device", "environment", "expected"),
    [
        ("cuda", {}, f"False {SETTING}"),
        ("", {}, f"False {SETTING}"),  # whatever there is
        ("cuda", {VARIABLE: OWN}, f"False {OWN}"),
        ("cpu", {}, "False None"),
    ],
    ids=["cuda", "any device", "own setting", "cpu"],
)
def test_an_engine_sets_it_before_torch_is_imported(
    device: str, environment: dict[str, str], expected: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM, device],
        env={"PATH": "", **environment},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == expected
