"""What a start finds out before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.launch.files import check_files, check_model
from service.launch.settings import Settings


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"api_key_file": "missing"}, r"^--api-key-file: .*/missing: No such file or directory$"),
        ({"api_key_file": "bad"}, r"^--api-key-file: .*/bad: line 1 is not a name and"),
        ({"admin_key_file": "bad"}, r"^--admin-key-file: .*/bad: line 1 is not a name and"),
        (
            {"lora_adapter_directory": "bad"},
            r"^--lora-adapter-directory: there is no such directory: .*/bad$",
        ),
        (
            {"tokenizer_config_path": "missing"},
            r"^--tokenizer-config-path: .*No such file or directory: .*/missing",
        ),
        (
            {"tls_certificate": "bad", "tls_key": "missing"},
            r"^--tls-certificate: .*/missing: No such file or directory$",
        ),
        (
            {"grpc_tls_certificate": "bad", "grpc_tls_key": "bad"},
            r"^--grpc-tls-certificate: .*/bad and .*/bad: no certificate, or no key$",
        ),
    ],
)
def test_files_that_cannot_be_used_are_reported_at_once(
    tmp_path: Path, changes: dict[str, str], error: str
) -> None:
    (tmp_path / "bad").write_text("nothing")
    paths: dict[str, Any] = {name: tmp_path / file for name, file in changes.items()}
    with pytest.raises(ValueError, match=error):
        check_files(Settings(**paths))


@pytest.mark.parametrize("name", ["tokenwire/demo", "gpt2", "some-owner/some.model"])
def test_the_bundled_model_and_names_of_the_hub_are_no_paths(name: str) -> None:
    check_model(Settings(model_id=name))


def test_a_directory_that_is_no_model_is_reported_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^--model-id: there is nothing in {tmp_path}$"):
        check_model(Settings(model_id=str(tmp_path)))
