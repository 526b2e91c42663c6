"""An engine imports neither torch's compiler nor divided tensors, and both are there when used."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.lean_imports import lean_imports
from tests.paths import REPOSITORY

SCRIPT = """
import sys
from engine.lean_imports import lean_imports
with lean_imports():
    import engine.build
heavy = ("torch._inductor", "torch._dynamo.convert_frame", "torch.distributed.tensor", "sympy.core")
print([name for name in heavy if name in sys.modules])
import torch
print(torch.distributed.is_available(), sys.modules["torch._dynamo"] is torch._dynamo)
deferred = torch._dynamo
marked = deferred.disable(print), deferred.allow_in_graph(print)
print(marked == (print, print), deferred.disable(recursive=False)(print) is print)
print("torch._dynamo.convert_frame" in sys.modules)
print(deferred.config.cache_size_limit == torch._dynamo.config.cache_size_limit)
print(torch._dynamo is not deferred, "torch._dynamo.convert_frame" in sys.modules)
compiled = torch.compile(lambda number: 2 * number, backend="eager")
print(compiled(torch.tensor(21)).item())
"""


def test_what_is_left_out_is_imported_when_it_is_used() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert printed == [
        "[]",
        "True True",
        "True True",
        "False",
        "True",
        "True True",
        "42",
    ]


ALGEBRA = """
import sys
from engine.lean_imports import lean_imports
with lean_imports():
    import engine.build
import torch
with torch.device("meta"):
    torch.nn.Embedding(4, 8), torch.nn.Linear(8, 8), torch.arange(0, 8, 2) / 8
print("sympy.core" in sys.modules)
shapes = sys.modules["torch.fx.experimental.symbolic_shapes"]
print(shapes.guard_or_false(True), shapes.sym_eq((1, 2), (1, 2)), shapes.is_nested_int(3))
import sympy
print(isinstance(3, sympy.Basic), "sympy.core" in sys.modules)
print(isinstance(sympy.Symbol("x"), sympy.Basic), sympy.core.numbers.Integer(3) == 3)
torch._dynamo.config  # which symbols are made with
symbol = shapes.ShapeEnv().create_unbacked_symint()
print(type(symbol).__name__, shapes.sym_eq(symbol, symbol), shapes.guard_or_false(symbol == 3))
import torch.fx.experimental.symbolic_shapes as real
print(real is not shapes, torch.fx.experimental.symbolic_shapes is real, hasattr(real, "ShapeEnv"))
"""


def test_algebra_is_imported_once_a_size_is_symbolic() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", ALGEBRA], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert printed == [
        "False",
        "True True False",
        "False False",
        "True True",
        "SymInt True False",
        "True True True",
    ]


def test_collections_of_garbage_go_on_afterwards() -> None:
    with pytest.raises(ValueError, match="broken"), lean_imports():
        assert not gc.isenabled()
        raise ValueError("broken")
    assert gc.isenabled()


TORCHVISION = """
import sys
from engine.lean_imports import lean_imports
with lean_imports(is_divided=len(sys.argv) > 1):
    import engine.build
    from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available
print(is_torchvision_available(), "torchvision" in sys.modules)
import torchvision
print(torchvision.is_imported)
"""


@pytest.mark.parametrize("words", [[], ["divided"]], ids=["whole", "divided"])
def test_torchvision_is_left_to_whoever_imports_it(tmp_path: Path, words: list[str]) -> None:
    """It imports a part of torch's compiler, which is not there without the whole."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("is_imported = True")
    printed = subprocess.run(
        [sys.executable, "-c", TORCHVISION, *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert printed == ["False False", "True"]
