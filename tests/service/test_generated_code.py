"""What is generated is committed as it is, the protos are clean, and our names are our own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from protos.generate import OUTPUT, PROTOS, generate

ROOT = PROTOS.parent


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "py.typed"
    }


def test_the_generated_package_is_up_to_date(tmp_path: Path) -> None:
    generate(tmp_path / "pb")
    fresh, committed = files(tmp_path / "pb"), files(OUTPUT)
    assert fresh.keys() == committed.keys()
    stale = [name for name, content in fresh.items() if committed[name] != content]
    assert stale == [], "run protos/generate.py"


def test_the_protos_are_clean(tmp_path: Path) -> None:
    image = tmp_path / "image.binpb"
    scripts, packages = (sysconfig.get_path(name) for name in ("scripts", "purelib"))
    protos = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTOS}",
            f"-I{packages}",
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={image}",
            *protos,
        ],
        check=True,
    )
    lint = subprocess.run(
        [str(Path(scripts) / "buf"), "lint", str(image), "--config", str(ROOT / "buf.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")


@pytest.mark.parametrize("folder", ["envoy", "protos"])
def test_folders_that_are_no_packages_stay_none(folder: str) -> None:
    """An `__init__.py` in `envoy` would hide the package that brings the binary."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", ["engine", "service"])
def test_nobody_else_installs_a_package_of_our_names(package: str) -> None:
    owners = importlib.metadata.packages_distributions().get(package, ["tokenwire"])
    assert set(owners) == {"tokenwire"}
