"""buf's gRPC client, written in Go, calls the server by reflection, over gRPC and gRPC-Web."""

from __future__ import annotations

import base64
import json
import subprocess
import sysconfig
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from service.routes import SERVICE
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack

BUF = Path(sysconfig.get_path("scripts")) / "buf"


@pytest.fixture(params=["grpc direct", "grpc envoy", "grpcweb envoy"])
def face(request: pytest.FixtureRequest, stack: Stack) -> tuple[str, ...]:
    """The options and the URL of an address."""
    protocol, which = request.param.split()
    address = stack.grpc_address if which == "direct" else stack.address
    over = ("--http2-prior-knowledge",) if protocol == "grpc" else ("--reflect-protocol=grpc-v1",)
    return (f"--protocol={protocol}", *over, f"http://{address}/{SERVICE}")


def curl(face: tuple[str, ...], method: str, body: object) -> subprocess.CompletedProcess[str]:
    """Calls a method."""
    *options, url = face
    return subprocess.run(
        [str(BUF), "curl", *options, f"--data={json.dumps(body)}", f"{url}/{method}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_text_is_generated(face: tuple[str, ...]) -> None:
    done = curl(face, "Generate", {"inputs": PROMPT, "parameters": {"maxNewTokens": 20}})
    assert done.returncode == 0, done.stderr
    assert "learning" in json.loads(done.stdout)["generatedText"]


def test_stream_has_a_message_per_token(face: tuple[str, ...]) -> None:
    done = curl(face, "GenerateStream", {"inputs": PROMPT, "parameters": {"maxNewTokens": 5}})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"token"') == 5


def test_refusal_has_its_code_field_and_reason(face: tuple[str, ...]) -> None:
    done = curl(face, "Generate", {"inputs": PROMPT, "parameters": {"topP": 1.5}})
    assert done.returncode != 0
    failure = json.loads(done.stderr)
    assert failure["code"] == "invalid_argument"
    assert "`top_p` must be > 0.0 and < 1.0" in failure["message"]
    packed = {item["type"]: base64.b64decode(item["value"] + "==") for item in failure["details"]}
    info = error_details_pb2.ErrorInfo.FromString(packed["google.rpc.ErrorInfo"])
    assert (info.reason, info.domain) == ("VALIDATION", SERVICE)
    bad = error_details_pb2.BadRequest.FromString(packed["google.rpc.BadRequest"])
    assert [violation.field for violation in bad.field_violations] == ["parameters.top_p"]
