"""`examples/grpc_client.py` as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from service.launch.sources import without_settings
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack
from tests.e2e.typed_messages import rest
from tests.paths import REPOSITORY


@pytest.mark.parametrize("flags", [[], ["--chat"]], ids=["generate", "chat"])
def test_example_streams_the_text(stack: Stack, flags: list[str]) -> None:
    command = [sys.executable, "-W", "error", "examples/grpc_client.py", *flags]
    command += ["--address", stack.grpc_address, "--max-new-tokens", "6", PROMPT]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=without_settings(os.environ),
    )
    assert (done.returncode, done.stderr) == (0, "")
    if flags:
        messages = [{"role": "user", "content": PROMPT}]
        request = {"messages": messages, "max_tokens": 6, "temperature": 0.0}
        body = rest(stack, "/v1/chat/completions", request)
        text = body["choices"][0]["message"]["content"]
    else:
        text = stack.generate(max_new_tokens=6)["generated_text"]
    assert done.stdout == text + "\n"


def test_example_reports_an_unreachable_server(unused_tcp_port: int) -> None:
    command = [sys.executable, "examples/grpc_client.py", f"--address=127.0.0.1:{unused_tcp_port}"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("UNAVAILABLE: ")
    assert "Traceback" not in done.stderr
