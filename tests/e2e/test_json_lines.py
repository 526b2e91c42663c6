"""With --json-output a server writes JSON lines and nothing else, from its start to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import (
    DEADLINE_S,
    PROMPT,
    SERVICE,
    START_S,
    TOKENWIRE,
    Stack,
    run_to_end,
    running,
    wait_until,
)

KEYS = {"timestamp", "level", "message", "target"}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def parsed(output: str) -> list[dict[str, Any]]:
    """All lines, each of which is a JSON object with the keys of log lines."""
    lines = [json.loads(line) for line in output.splitlines()]
    for line in lines:
        assert line.keys() >= KEYS, line
    return lines


def test_a_whole_run_is_json_and_a_lost_collector_holds_up_nothing(tmp_path: Path) -> None:
    secret = "a secret prompt"
    # A name that is never found, for Envoy, and for the service.
    flags = ("--json-output", "--otlp-endpoint=http://collector.invalid:4317")
    variables = {"OTEL_BSP_SCHEDULE_DELAY": "50", "PYTHONWARNINGS": "always"}
    log = tmp_path / "log"
    with running(log, *flags, environment={**os.environ, **variables}) as stack:
        headers = {"x-request-id": "mine", "traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
        body = {"inputs": secret, "parameters": {"max_new_tokens": 3}}
        for path in ("/generate", "/generate_stream"):
            assert stack.http.post(path, json=body, headers=headers).status_code == 200
        assert stack.http.post("/generate", json={"inputs": ""}).status_code == 422
        assert stack.http.get("/nowhere").status_code == 404
        stack.direct.unary_unary(f"/{SERVICE}/Info")(b"", timeout=DEADLINE_S)
        wait_until(lambda: "Failed to export" in stack.log(), "the service gives up its spans")
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(DEADLINE_S) == 0
    lines = parsed(log.read_text())
    assert secret not in log.read_text()
    ours = [line for line in lines if line.get("request_id") == "mine"]
    assert {line["trace_id"] for line in ours} == {TRACE_ID}
    by_target = {
        target: [line for line in ours if line["target"] == target]
        for target in ("service.access", "envoy.access")
    }
    for target, found in by_target.items():
        assert [line["path"] for line in found] == ["/generate", "/generate_stream"], target
    for line in by_target["service.access"]:
        assert (line["status"], line["caller"]) == ("OK", "127.0.0.1")
        assert line["generated_tokens"] == 3
        parts = ("queue_seconds", "first_token_seconds", "inference_seconds")
        assert all(0 <= line[part] <= line["seconds"] for part in parts)
    failed = [line for line in lines if line.get("error") == "validation"]
    assert [line["status"] for line in failed] == ["INVALID_ARGUMENT"]
    missed = [line for line in lines if line.get("path") == "/nowhere"]
    assert [(line["target"], line["status"]) for line in missed] == [("envoy.access", 404)]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model-id=/no/such/model",), "there is no such directory"),
        (("--otlp-endpoint=nonsense://",), "`otlp_endpoint` must be a URL"),
        (("--port=-1",), "`port` must be"),
    ],
)
def test_a_start_that_fails_says_so_in_json(flags: tuple[str, ...], reason: str) -> None:
    ended = run_to_end("--json-output", *flags)
    assert ended.returncode != 0
    assert ended.stdout == ""
    lines = parsed(ended.stderr)
    assert reason in lines[-1]["message"]


def test_processes_that_run_alone_write_json_too(tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            TOKENWIRE,
            "engine",
            "--json-output",
            "--engine-socket",
            tmp_path / "s",
            "--model-id",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert ended.returncode == 1
    lines = parsed(ended.stdout + ended.stderr)
    assert lines[-1]["message"].startswith("tokenwire engine: ")


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import service.app, service.cli, sys; print(*(n for n in sys.modules if 'opentel' in n))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "\n"


def test_people_read_text(stack: Stack) -> None:
    stack.generate(PROMPT)
    wait_until(lambda: "envoy.access: POST /generate 200" in stack.log(), "Envoy's line")
    wait_until(lambda: "service.access: Generate /generate OK" in stack.log(), "the service's line")
    assert "Tokenwire is ready." in stack.log()
