"""What a server writes while it starts: bars for a terminal, lines for everything else."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from service.launch.sources import without_settings
from tests.e2e.stack import DEADLINE_S, Stack, command, running

LOADING = b"Loading weights"


def test_there_are_no_bars_where_output_is_no_terminal(stack: Stack) -> None:
    written = stack.log_path.read_bytes()
    assert b"\r" not in written
    assert LOADING not in written


@pytest.mark.parametrize(("flags", "has_bar"), [((), True), (("--json-output",), False)])
def test_a_bar_is_shown_on_a_terminal_unless_all_is_json(
    flags: tuple[str, ...], has_bar: bool
) -> None:
    written = start_on_terminal(command(*flags), until=LOADING if has_bar else b'"rest": "')
    assert (LOADING in written) is has_bar


def test_a_configuration_file_can_ask_for_json_alone(tmp_path: Path) -> None:
    config = tmp_path / "tokenwire.toml"
    config.write_text("json_output = true\n")
    with running(tmp_path / "log", f"--config={config}") as server:
        server.http.get("/info").raise_for_status()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)


def start_on_terminal(arguments: list[str], until: bytes) -> bytes:
    """What a server shows until it has shown `until`, after which it is ended."""
    ours, theirs = pty.openpty()
    server = subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=without_settings(os.environ)
    )
    os.close(theirs)
    shown = b""
    try:
        while until not in shown and server.poll() is None:
            shown += os.read(ours, 65536)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            while os.read(ours, 65536):
                pass
        except OSError:  # all its processes have ended
            server.wait(DEADLINE_S)
        os.close(ours)
    return shown
