"""`tokenwire chat` in pipes and on a terminal, over REST and gRPC."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import pytest

from service.launch.sources import without_settings
from tests.e2e.stack import DEADLINE_S, TOKENWIRE, Stack
from tests.e2e.tools import TOOLS, WEATHER_QUESTION

GREEDY = ("--param=temperature=0", "--param=max_tokens=12")
ENDLESS = ("--param=temperature=1000000", "--param=seed=2", "--param=max_tokens=2000")


def piped(question: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(TOKENWIRE), "chat", *flags],
        input=question,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=without_settings(os.environ),
    )


def expected(stack: Stack, question: str) -> str:
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 12,
    }
    reply = stack.http.post("/v1/chat/completions", json=body).json()
    return str(reply["choices"][0]["message"]["content"])


def test_a_pipe_gets_the_answer_alone(stack: Stack, target: str) -> None:
    question = "What is the capital of France?"
    done = piped(question, f"--target={target}", *GREEDY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(stack, question) + "\n"


def test_a_refusal_is_one_line_with_the_servers_reason(target: str) -> None:
    done = piped("hi", f"--target={target}", "--param=top_p=7")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("tokenwire chat: ")
    assert "top_p" in done.stderr


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_not_there_is_named(scheme: str) -> None:
    done = piped("hi", f"--target={scheme}://127.0.0.1:1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"no answer from {scheme}://127.0.0.1:1" in done.stderr


def _take_interrupts() -> None:
    """As on a terminal: what a shell starts in the background is told to ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        plain = {"TERM": "xterm"} | environment
        names = without_settings(os.environ)
        names.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [str(TOKENWIRE), "chat", *flags],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_interrupts,
            env=names | plain,
        )
        os.close(theirs)
        self.shown = ""

    def until(self, text: str) -> str:
        """Reads until `text` comes; returns what came since the last call."""
        new = ""
        while text not in new:
            try:
                more = os.read(self._ours, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended before {text!r}: {self.shown!r}") from None
            new += more
            self.shown += more
        return new

    def until_more(self) -> None:
        """Reads until something comes that is more than the end of a line."""
        while not os.read(self._ours, 65536).strip():
            pass

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt_until_the_end(self) -> int:
        """Presses Ctrl-C again where it came between a prompt and the wait for its answer."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        return self.end()

    def end(self) -> int:
        try:
            while os.read(self._ours, 65536):
                pass
        except OSError:  # it has ended
            pass
        os.close(self._ours)
        return self.process.wait(DEADLINE_S)


def test_a_conversation_is_kept_saved_and_begun_anew(target: str, tmp_path: Path) -> None:
    terminal = Terminal(f"--target={target}", *GREEDY, NO_COLOR="1")
    terminal.until("> ")
    for line in ("/system Be kind.", "Hi", "/regenerate", "Bye", f"/save {tmp_path}/a", "/new"):
        terminal.type(f"{line}\n")
        terminal.until("\n> ")
    terminal.type(f"/save {tmp_path}/b\n")
    terminal.until("\n> ")
    terminal.type("/quit\n")
    assert terminal.end() == 0
    roles = [item["role"] for item in json.loads((tmp_path / "a").read_text())["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert len(json.loads((tmp_path / "b").read_text())["messages"]) == 1
    assert "\x1b[2m" not in terminal.shown


def test_ctrl_c_stops_an_answer_and_then_the_program(target: str) -> None:
    terminal = Terminal(f"--target={target}", *ENDLESS)
    terminal.until("> ")
    terminal.type("Talk\n")
    terminal.until("Talk\r\n")
    terminal.until_more()
    terminal.process.send_signal(signal.SIGINT)
    assert "\x1b[2m(stopped)" in terminal.until("> \x1b[0m")
    assert terminal.interrupt_until_the_end() == 0


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A file with tools that the bundled model can call."""
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    return file


def test_a_pipe_gets_calls_as_lines_of_json(target: str, tools: Path) -> None:
    done = piped(
        WEATHER_QUESTION, f"--target={target}", f"--tools={tools}", "--param=temperature=0"
    )
    assert done.returncode == 0, done.stderr
    call = json.loads(done.stdout)
    assert (call["name"], call["arguments"]) == ("get_weather", {"location": "Paris"})
    assert re.fullmatch(r"call_\w{24}", call["id"])


def test_what_a_call_returns_is_typed_and_the_model_goes_on(target: str, tools: Path) -> None:
    terminal = Terminal(f"--target={target}", "--param=temperature=0", NO_COLOR="1")
    terminal.until("> ")
    terminal.type(f"/tools {tools}\n")
    terminal.until("\n> ")
    terminal.type(f"{WEATHER_QUESTION}\n")
    assert 'get_weather {"location": "Paris"}' in terminal.until("returns: ")
    terminal.type('{"temperature": 20, "conditions": "sunny"}\n')
    assert "It is 20 degrees and sunny in Paris." in terminal.until("\n> ")
    terminal.type("/params tool_choice=get_time\n")
    terminal.until("\n> ")
    terminal.type("/regenerate\n")
    assert "get_time {" in terminal.until("returns: ")
    terminal.type("/quit\n")  # what is typed there is no command
    terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_wrong_commands_and_parameters_are_told_and_ctrl_d_ends(stack: Stack) -> None:
    terminal = Terminal(f"--target={stack.url}", NO_COLOR="1")
    terminal.until("> ")
    for line, answer in (
        ("/hlep", "did you mean /help?"),
        ("/params temprature=1", "did you mean temperature?"),
        ("/params temperature=0.5", '{"temperature": 0.5}'),
        ("/regenerate", "there is no answer yet"),
    ):
        terminal.type(f"{line}\n")
        assert answer in terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.end() == 0
