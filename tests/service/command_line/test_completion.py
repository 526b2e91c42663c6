"""The completion scripts, in the shells themselves where they are installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from service import cli
from service.command_line.completion import SHELLS, script
from service.command_line.parser import commands_of, flags_of
from tests.service.command_line.shells import needs, offered_by_fish

PARSER = cli._make_parser()


def complete_in_bash(tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    file = tmp_path / "completion"
    file.write_text(script(PARSER, "bash"))
    quoted = " ".join(f'"{word}"' for word in ("tokenwire", *words))
    code = (
        f"source {file}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; "
        '_tokenwire; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-u", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["s"], ["serve", "service"]),
        (["--v"], ["--version"]),
        (["serve", "--grpc-p"], ["--grpc-port"]),
        (["serve", "--dtype", ""], ["float32", "float16", "bfloat16"]),
        (["serve", "--dtype", "b"], ["bfloat16"]),
        (["engine", "--quantize", "int"], ["int8", "int4"]),
        (["engine", "--por"], []),
        (["bench", "--conc"], ["--concurrency"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["serve", "--config", "tok"], ["tokenwire.toml"]),
        (["serve", "--tls-key", "tok"], ["tokenwire.toml"]),
    ],
)
def test_bash_offers_what_fits(tmp_path: Path, words: list[str], offers: list[str]) -> None:
    (tmp_path / "tokenwire.toml").touch()
    assert complete_in_bash(tmp_path, *words) == offers


@pytest.mark.parametrize("shell", SHELLS)
def test_every_flag_that_help_shows_is_in_the_script(shell: str) -> None:
    text = script(PARSER, shell)
    for name, command in commands_of(PARSER).items():
        assert name in text
        for flag in flags_of(command):
            assert (f"-l {flag[2:]} " if shell == "fish" else flag) in text
    assert "ngrok" not in text  # which is refused


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_shell_takes_its_script(tmp_path: Path, shell: str) -> None:
    program = needs(shell)
    file = tmp_path / "completion"
    file.write_text(script(PARSER, shell))
    done = subprocess.run([program, "-n", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("tokenwire s", ["serve", "service"]),
        ("tokenwire serve --grpc-p", ["--grpc-port"]),
        ("tokenwire serve --dtype ", ["bfloat16", "float16", "float32"]),
        ("tokenwire engine --quantize int", ["int4", "int8"]),
        ("tokenwire engine --por", []),
        ("tokenwire completion ", ["bash", "fish", "zsh"]),
        ("tokenwire serve --config tok", ["tokenwire.toml"]),
        ("tokenwire chat --tools tok", ["tokenwire.toml"]),
    ],
)
def test_fish_offers_what_fits(tmp_path: Path, line: str, offers: list[str]) -> None:
    (tmp_path / "tokenwire.toml").touch()
    file = tmp_path / "completion"
    file.write_text(script(PARSER, "fish"))
    assert sorted(offered_by_fish(file, line)) == offers


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish"]) == 0
    assert capsys.readouterr().out == script(PARSER, "fish")
