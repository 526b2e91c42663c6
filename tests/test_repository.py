"""Files that no other test uses: locks, container files, links in documents."""

from __future__ import annotations

import json
import re

import pytest

from tests.paths import REPOSITORY


@pytest.mark.parametrize("folder", ["protos/node", "tokenizers"])
def test_npm_lock_has_versions_and_hashes_and_no_addresses(folder: str) -> None:
    lock = json.loads((REPOSITORY / "tests" / folder / "package-lock.json").read_text())
    packages = [entry for name, entry in lock["packages"].items() if name]
    assert packages
    assert all(entry["version"] and entry["integrity"] for entry in packages)
    assert not [entry for entry in packages if "resolved" in entry]


def test_relative_links_in_documents_resolve() -> None:
    for document in [
        REPOSITORY / "README.md",
        REPOSITORY / "CHANGELOG.md",
        *REPOSITORY.glob("docs/**/*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_tests_that_the_threat_model_names_exist() -> None:
    named = re.findall(r"`(tests/[^`]+)`", (REPOSITORY / "SECURITY.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


def test_the_readme_names_every_rpc() -> None:
    protos = (REPOSITORY / "protos" / "tokenwire" / "v1" / "text_generation.proto").read_text()
    (row,) = re.findall(
        r"^\| gRPC \| (.*) \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(row.split(", ")) == sorted(re.findall(r"^  rpc (\w+)\(", protos, re.MULTILINE))


def test_the_architecture_names_every_benchmark() -> None:
    """Scripts that others run, in processes of their own, need no name there."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`(\w+)`", text.partition("\n## The benchmarks\n")[2]))
    helpers = re.compile(r"echo_\w+|\w+_worker|llama_build|watched_service")
    scripts = {
        path.stem
        for path in (REPOSITORY / "benchmarks").glob("*.py")
        if '__name__ == "__main__"' in path.read_text() and not helpers.fullmatch(path.stem)
    }
    assert named == scripts | {"simulation"}
