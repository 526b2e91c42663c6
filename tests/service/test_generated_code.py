"""The generated code is up to date, and our package names are ours."""

from __future__ import annotations

import importlib.metadata
import tempfile
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


@pytest.mark.parametrize(
    "settings", ["line-length = 60\n", 'extend-exclude = ["*"]\n', "not settings at all"]
)
def test_ruff_settings_of_the_machine_do_not_change_what_is_generated(
    settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = tmp_path / "tmp"
    around.mkdir()
    (around / "ruff.toml").write_text(settings)
    monkeypatch.setattr(tempfile, "tempdir", str(around))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(around))
    generate(tmp_path / "pb")
    assert files(tmp_path / "pb") == files(OUTPUT)


def test_of_googles_types_only_those_that_messages_use_are_generated() -> None:
    from service.pb.google import api, protobuf

    assert api.__all__ == ("HttpBody",)
    assert protobuf.__all__ == ("Any", "ListValue", "NullValue", "Struct", "Value")


@pytest.mark.parametrize("folder", ["envoy", "protos"])
def test_folders_that_are_no_packages_have_no_init_file(folder: str) -> None:
    """An `__init__.py` in `envoy` would hide the package that brings the binary."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", ["engine", "service"])
def test_no_other_distribution_installs_packages_of_our_names(package: str) -> None:
    owners = importlib.metadata.packages_distributions().get(package, ["tokenwire"])
    assert set(owners) == {"tokenwire"}
