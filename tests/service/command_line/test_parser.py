"""Errors of the command line: one line, with what was probably meant."""

from __future__ import annotations

import pytest

from service import cli


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["serv"], "tokenwire: unknown command serv; did you mean serve?\n"),
        (["bnech"], "tokenwire: unknown command bnech; did you mean bench?\n"),
        (["xyz"], "tokenwire: unknown command xyz; see tokenwire --help\n"),
        (["serve", "--prot=1"], "tokenwire serve: unknown flag --prot; did you mean --port?\n"),
        (["engine", "--quantise", "int8"],
         "tokenwire engine: unknown flag --quantise; did you mean --quantize?\n"),
        (["bench", "--concurency", "2"],
         "tokenwire bench: unknown flag --concurency; did you mean --concurrency?\n"),
        (["serve", "--zzz"], "tokenwire serve: unknown flag --zzz\n"),
        (["serve", "model"], "tokenwire serve: unexpected argument model\n"),
        (["serve", "--port"], "tokenwire serve: argument --port: expected one argument\n"),
        (["--prot"], "tokenwire: the following arguments are required: command\n"),
        ([], "tokenwire: the following arguments are required: command\n"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", text)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    name, version = capsys.readouterr().out.split()
    assert name == "tokenwire"
    assert version.split(".")[0].isdigit()


@pytest.mark.parametrize(
    ("model", "text"),
    [("/nope", "there is no such directory: /nope"), ("a/b/c", "there is no such directory: a/b/c"),
     ("./here", "there is no such directory: here"), (__file__, f"{__file__} is neither"),
     ("/proc", "there is no config.json in /proc")],
)  # fmt: skip
@pytest.mark.parametrize("command", ["serve", "engine", "service"])
def test_a_wrong_path_of_the_model_is_named_first(
    command: str, model: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [command, f"--model-id={model}", "--engine-socket=s", "--port=1"]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"tokenwire {command}: --model-id: {text}")
    assert error.count("\n") == 1
