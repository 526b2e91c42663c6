"""The wheel has everything that a server needs, wherever it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
WHERE = """
from service.bundled import DESCRIPTORS, OPENAPI, PACKAGE, demo_model, envoy_template
from engine.kernels.build import SOURCE
weights = demo_model() / "model.safetensors"
files = DESCRIPTORS, OPENAPI / "contract.json", weights, envoy_template(), SOURCE
print(PACKAGE, *(file for file in files if file.exists()), sep="\\n")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the wheel installs, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, *build, str(REPOSITORY)], check=True)
    (wheel,) = folder.glob("tokenwire-*.whl")
    target = folder / "installed"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def run(installed: Path, *arguments: str) -> str:
    """What Python prints outside the checkout, with the installed packages before all others."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_every_file_that_comes_with_the_package_is_in_it(installed: Path) -> None:
    package, *files = run(installed, "-c", WHERE).splitlines()
    assert Path(package) == installed / "service"
    assert len(files) == 5
    assert [file for file in files if installed not in Path(file).parents] == []


def test_envoys_configuration_names_the_installed_descriptors(installed: Path) -> None:
    configuration = run(installed, "-m", "service.cli", "envoy-config", "--gateway-port=1")
    assert str(installed / "service" / "pb" / "descriptors.binpb") in configuration
