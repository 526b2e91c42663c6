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
