"""The wheel has everything that a server needs, below one name, wherever it is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from hatch_build import moved
from tests.e2e.stack import running
from tests.paths import REPOSITORY

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
WHERE = """
from tokenwire.service.bundled import DESCRIPTORS, OPENAPI, PACKAGE, demo_model, envoy_template
from tokenwire.engine.kernels.build import SOURCE
protos = PACKAGE / "protos" / "tokenwire" / "v1" / "generate.proto"
model = demo_model()
files = DESCRIPTORS, OPENAPI / "contract.json", OPENAPI / "additions.json", envoy_template(), SOURCE
files += model / "model.safetensors", model / "train.py", protos
print(PACKAGE, *(file for file in files if file.exists()), sep="\\n")
"""
# What Python 3.12 and 3.13 no longer have (docs.python.org, "What's New").
REMOVED = {
    *("asynchat", "asyncore", "distutils", "imp", "smtpd"),
    *("aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "lib2to3", "mailcap"),
    *("msilib", "nis", "nntplib", "ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib"),
    *("uu", "xdrlib"),
}


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


@pytest.fixture
def environment(installed: Path, tmp_path: Path) -> dict[str, str]:
    """Variables with which the wheel is found, and the checkout's names are somebody else's."""
    for name in ("engine", "service"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not a part of tokenwire')\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{installed}"}


def run(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints outside the checkout."""
    ended = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def sources(installed: Path) -> Iterator[tuple[Path, ast.Module]]:
    """The Python files of the wheel, read as Python 3.11 reads them."""
    for path in (installed / "tokenwire").rglob("*.py"):
        yield path, ast.parse(path.read_text(), feature_version=(3, 11))


def imported(tree: ast.Module) -> set[str]:
    """The first words of absolute imports."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_every_file_that_comes_with_the_package_is_in_it(
    installed: Path, environment: dict[str, str]
) -> None:
    package, *files = run([sys.executable, "-c", WHERE], environment).splitlines()
    assert Path(package) == installed / "tokenwire" / "service"
    assert len(files) == 8
    assert [file for file in files if installed not in Path(file).parents] == []


def test_all_of_the_kernels_source_is_there(installed: Path) -> None:
    """One file includes the others, by name."""
    there = {file.name for file in (installed / "tokenwire" / "engine" / "kernels" / "c").iterdir()}
    assert there == {file.name for file in (REPOSITORY / "engine" / "kernels" / "c").iterdir()}


def test_one_name_is_all_that_it_occupies(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"bin", "tokenwire"}
    # No __init__.py: code made of the protos, `tokenwire.v1`, may be installed beside it.
    assert {path.name for path in (installed / "tokenwire").iterdir()} == {"engine", "service"}


def test_no_file_imports_the_names_of_the_checkout_or_what_newer_pythons_lack(
    installed: Path,
) -> None:
    found = {
        path: imported(tree) & (REMOVED | {"engine", "service"})
        for path, tree in sources(installed)
    }
    assert len(found) > 150
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_file_compiles(installed: Path, version: str, tmp_path: Path) -> None:
    python = shutil.which(f"python{version}") or "python"
    told = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
    if not told.stdout.startswith(f"Python {version}."):  # a manager of versions may have a stub
        pytest.skip(f"there is no Python {version}")
    command = [python, "-m", "compileall", "-q", str(installed / "tokenwire")]
    run(command, {"PYTHONPYCACHEPREFIX": str(tmp_path), "PATH": os.defpath})


def test_code_made_of_the_protos_can_be_imported_beside_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tokenwire" / "v1").mkdir(parents=True)
    (tmp_path / "tokenwire" / "v1" / "generate_pb2.py").write_text("")
    code = "import tokenwire.v1.generate_pb2, tokenwire.service.cli, tokenwire.engine.protocol"
    run([sys.executable, "-c", code], environment)


def test_metadata_is_complete(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    metadata = distribution.metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata.get_all("Project-URL")
    assert metadata.get_payload().startswith("# ")  # the README
    pythons = SpecifierSet(metadata["Requires-Python"])
    for version in ("3.11", "3.12", "3.13"):
        assert version in pythons
        assert f"Programming Language :: Python :: {version}" in metadata.get_all("Classifier")
    (command,) = distribution.entry_points
    assert (command.name, command.value) == ("tokenwire", "tokenwire.service.cli:main")


def test_the_command_tells_its_version(installed: Path, environment: dict[str, str]) -> None:
    version = run([str(installed / "bin" / "tokenwire"), "--version"], environment)
    assert version == f"tokenwire {importlib.metadata.version('tokenwire')}\n"


def test_envoys_configuration_names_the_installed_descriptors(
    installed: Path, environment: dict[str, str]
) -> None:
    command = [str(installed / "bin" / "tokenwire"), "envoy-config", "--gateway-port=1"]
    descriptors = installed / "tokenwire" / "service" / "pb" / "descriptors.binpb"
    assert str(descriptors) in run(command, environment)


def test_it_serves(installed: Path, environment: dict[str, str], tmp_path: Path) -> None:
    # The server's command line begins with the checkout's command: another one takes its place.
    prefix = ["env", "--chdir=/", "sh", "-c", 'shift; exec "$0" "$@"']
    prefix.append(str(installed / "bin" / "tokenwire"))
    with running(tmp_path / "log", prefix=prefix, environment=environment) as stack:
        assert stack.generate()["details"]["generated_tokens"] == 8
        grammar = {"type": "json", "value": {"enum": ["yes"]}}  # by way of a process of its own
        assert stack.generate(grammar=grammar)["generated_text"] == '"yes"'
        programs = {word for child in stack.children() for word in child.cmdline()}
    assert "tokenwire.service.cli" in programs
    assert not {word for word in programs if word.startswith(("service.", "engine."))}


def test_an_import_that_cannot_be_moved_ends_the_build() -> None:
    here = Path("service/somewhere.py")
    assert (
        moved("from engine.batch import Batch\n", here)
        == "from tokenwire.engine.batch import Batch\n"
    )
    assert moved("from engineering import x\n", here) == "from engineering import x\n"
    assert moved("    from service import cli\n", here) == "    from tokenwire.service import cli\n"
    with pytest.raises(ValueError, match=r"service/somewhere\.py:2: write `from engine import …`"):
        moved("import os\nimport engine.batch\n", here)
