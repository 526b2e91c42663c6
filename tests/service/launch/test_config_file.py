"""Settings from a file, and what wins over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.launch.config_file import read_config
from service.launch.options import SettingsError
from service.launch.settings import Settings
from service.launch.sources import without_settings
from tests.service.launch.test_settings import parse

CONTENT = """
model-id = "/models/llama"
port = 3000
max_waiting_seconds = 5
access-log = false
cuda_graphs = [8, 16]
api_key_exempt = ["health", "docs"]
tls_cert = "chain.pem"
tls-key = "key.pem"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenwire.toml"
    path.write_text(CONTENT)
    return path


def test_a_file_sets_what_it_names_and_nothing_else(file: Path) -> None:
    assert parse(f"--config={file}") == Settings(
        model_id="/models/llama",
        port=3000,
        max_waiting_seconds=5.0,
        access_log=False,
        cuda_graphs=(8, 16),
        api_key_exempt=("health", "docs"),
        tls_certificate=Path("chain.pem"),
        tls_key=Path("key.pem"),
    )


def test_flags_win_over_variables_and_these_over_the_file(file: Path) -> None:
    assert parse("--port=1", f"--config={file}", PORT="2").port == 1
    assert parse(f"--config={file}", PORT="2").port == 2
    assert parse(f"--config={file}").port == 3000
    assert parse("--cuda-graphs=4", f"--config={file}").cuda_graphs == (4,)


def test_a_variable_may_name_the_file(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("port = 4000")
    assert parse(TOKENWIRE_CONFIG=str(file)).port == 3000
    assert parse(f"--config={other}", TOKENWIRE_CONFIG=str(file)).port == 4000


def test_children_do_not_read_it_again(file: Path) -> None:
    assert without_settings({"TOKENWIRE_CONFIG": str(file), "HOME": "/"}) == {"HOME": "/"}
    settings = parse(f"--config={file}")
    assert parse(*settings.to_argv()) == settings


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("prot = 1", "unknown setting prot; did you mean port?"),
        ("max-totl-tokens = 1", "unknown setting max-totl-tokens; did you mean max_total_tokens?"),
        ("something = 1", "unknown setting something"),
        ("rope_factor = 2", "rope_factor is not supported: positions are scaled"),
        ("api-key = 'secret'", "use --api-key-file"),
        ("[server]\nport = 1", "[server] is a table; all settings stand at the top"),
        ("port = '3000'", "port must be a whole number. Given: '3000'"),
        ("port = 3000.5", "port must be a whole number. Given: 3000.5"),
        ("port = true", "port must be a whole number. Given: True"),
        ("max_waiting_seconds = 'long'", "max_waiting_seconds must be a number. Given: 'long'"),
        ("access_log = 1", "access_log must be true or false. Given: 1"),
        ("model_id = 7", "model_id must be a text. Given: 7"),
        ("port = [1, 2]", "port must be a whole number. Given: [1, 2]"),
        ("cuda_graphs = [8, 'few']", "cuda_graphs must be a whole number. Given: 'few'"),
        ("dtype = 'int8'", "dtype must be one of float32, float16, bfloat16. Given: int8"),
        ("port = 70000", "`port` must be 0 to 65535. Given: 70000"),
        ("port = 1\nport = 2", "Cannot overwrite"),
        ("port", "Expected '='"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "tokenwire.toml"
    path.write_text(content)
    with pytest.raises(SettingsError) as refused:
        parse(f"--config={path}")
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(SettingsError, match=r"--config .*: (No such|Is a)") as refused:
        read_config(path)
    assert str(path) in str(refused.value)
