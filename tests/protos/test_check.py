"""The protos are clean and compatible with the last release, and what is not would be found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from protos.check import RELEASED, check
from tests.paths import REPOSITORY


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what buf reads."""
    shutil.copyfile(REPOSITORY / "buf.yaml", tmp_path / "buf.yaml")
    shutil.copytree(REPOSITORY / "protos" / "tokenwire", tmp_path / "protos" / "tokenwire")
    return tmp_path


def change(checkout: Path, file: str, old: str, new: str) -> None:
    path = checkout / "protos" / "tokenwire" / "v1" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_protos_are_clean_and_compatible_with_the_last_release(checkout: Path) -> None:
    assert check(checkout) == ""


def test_bufs_own_commands_work_in_a_checkout_that_was_checked(checkout: Path) -> None:
    check(checkout)
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    nowhere = {**os.environ, "HOME": str(checkout), "HTTPS_PROXY": "http://127.0.0.1:1"}
    for command in (["lint"], ["build"], ["ls-files"]):
        subprocess.run([str(buf), *command], cwd=checkout, env=nowhere, check=True)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("chat.proto", "uint32 index = 1;", "string index = 1;", 'changed type from "uint32"'),
        ("chat.proto", "string role = 1;", "string part = 1;", 'changed name from "role"'),
        ("generate.proto", "  optional uint32 best_of = 1;\n", "", "deleted without reserving"),
        ("generate.proto", "repeated string stop = 11;", "string stop = 11;", "cardinality"),
        ("generate.proto", "FINISH_REASON_LENGTH = 1", "FINISH_REASON_SIZE = 1", "changed name"),
        ("chat.proto", "TYPE_REGEX = 2", "TYPE_PATTERN = 2", "changed name"),
        ("text_generation.proto", "rpc Health(HealthRequest)", "rpc Health(InfoRequest)", "type"),
    ],
)
def test_a_change_that_breaks_callers_is_found(
    checkout: Path, file: str, old: str, new: str, said: str
) -> None:
    change(checkout, file, old, f"// Planted.\n{new}" if new else "")
    found = check(checkout)
    assert f"tokenwire/v1/{file}:" in found
    assert said in found


def test_a_field_may_be_added(checkout: Path) -> None:
    added = "// Added.\noptional bool added = 99;\n// A list"
    change(checkout, "generate.proto", "// The adapter to apply.", added)
    assert check(checkout) == ""


def test_a_field_without_a_comment_is_found(checkout: Path) -> None:
    change(checkout, "server.proto", "  // Its name, as in `model_id` of Info.\n", "")
    assert 'Field "id" should have a non-empty comment' in check(checkout)


def test_a_proto_that_does_not_compile_is_found(checkout: Path) -> None:
    change(checkout, "chat.proto", "repeated Message messages", "repeated Massage messages")
    assert "Massage" in check(checkout)


def test_the_last_release_is_a_whole_descriptor_set() -> None:
    names = {file.name for file in FileDescriptorSet.FromString(RELEASED.read_bytes()).file}
    assert "tokenwire/v1/text_generation.proto" in names
    assert "google/api/httpbody.proto" in names


@pytest.mark.parametrize(
    "option",
    [
        'csharp_namespace = "Tokenwire.V1"',
        'go_package = "tokenwire/v1;tokenwirev1"',
        "java_multiple_files = true",
        'java_package = "tokenwire.v1"',
    ],
)
def test_every_proto_says_what_its_code_is_called(option: str) -> None:
    protos = list((REPOSITORY / "protos" / "tokenwire").rglob("*.proto"))
    assert protos
    assert [path.name for path in protos if f"option {option};\n" not in path.read_text()] == []
