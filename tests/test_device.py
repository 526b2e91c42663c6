"""The option `--device` of pytest: what it decides, and that it does not pretend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import device
from tests.device import device_type
from tests.paths import REPOSITORY


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--device", "cpu"], "cpu"),
        (["-q", "--device=cuda", "tests/engine"], "cuda"),
        (["tests", "--", "--device=cpu"], "cpu"),
        (["-x", "tests/test_device.py", "--deselect", "cuda"], None),
        ([], None),
    ],
)
def test_it_is_what_is_asked_for_or_what_there_is(
    words: list[str],
    wanted: str | None,
    has_gpu: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(device, "_DRIVER_FILE", tmp_path if has_gpu else tmp_path / "none")
    assert device_type(words) == (wanted or ("cuda" if has_gpu else "cpu"))


def test_pytests_own_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest", "tests"])
    monkeypatch.setenv("PYTEST_ADDOPTS", "-q --device=cuda")
    assert device_type() == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_ends_the_run_in_one_line() -> None:
    command = [sys.executable, "-m", "pytest", "--device=cuda", "tests/test_device.py"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --device cuda: torch" in ended.stderr
    assert "passed" not in ended.stdout
