"""Code that comes with a checkpoint runs with `--trust-remote-code` alone, and nobody is asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.fakes import MODEL

PARTS = ("tokenizer", "engine")
_RAN = "from pathlib import Path\n(Path({folder!r}) / '{name}.ran').touch()\n"
_CODE = {
    "own_tokenizer": "from transformers import PreTrainedTokenizerFast\n"
    "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n",
    "own_config": "from transformers import LlamaConfig\n"
    "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "own_model": "from transformers import LlamaForCausalLM\n"
    "from .own_config import OwnConfig\n"
    "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
_CONFIG_MAP = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The demo model, as a kind that only its own code knows; each file leaves a trace."""
    path = tmp_path / "own"
    shutil.copytree(MODEL, path)
    for name, code in _CODE.items():
        (path / f"{name}.py").write_text(_RAN.format(folder=str(tmp_path), name=name) + code)
    _change(path / "config.json", model_type="own", auto_map=_CONFIG_MAP)
    _change(
        path / "tokenizer_config.json",
        tokenizer_class=None,
        auto_map={"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]},
    )
    return path


def _change(file: Path, **fields: object) -> None:
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value}))


def load(part: str, checkpoint: Path, trust: str) -> tuple[str, set[str]]:
    """What loading prints where a terminal would say yes to all, and which code has run."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.remote_code", part, str(checkpoint), trust],
        input="y\ny\ny\n",
        env=os.environ | {"HF_MODULES_CACHE": str(checkpoint.parent / "modules")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, {file.stem for file in checkpoint.parent.glob("*.ran")}


@pytest.mark.parametrize("part", PARTS)
def test_no_code_runs_and_nobody_is_asked_without_the_flag(part: str, checkpoint: Path) -> None:
    printed, ran = load(part, checkpoint, "no")
    assert "runs only with --trust-remote-code" in printed
    assert printed.endswith("left: y\ny\ny\n\n")
    assert not ran


@pytest.mark.parametrize("part", PARTS)
def test_the_flag_lets_code_run(part: str, checkpoint: Path) -> None:
    printed, ran = load(part, checkpoint, "yes")
    assert printed == "loaded\nleft: y\ny\ny\n\n"
    assert ran >= ({"own_tokenizer"} if part != "engine" else set(_CODE))
