"""grpclib, a gRPC client in pure Python, calls the server with the stubs that its plug-in makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from protos.generate import protoc
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack

PLUGIN = Path(sysconfig.get_path("scripts")) / "protoc-gen-grpclib_python"
SCRIPT = """
import asyncio, json, sys
from google.rpc import error_details_pb2
from grpclib.client import Channel
from grpclib.exceptions import GRPCError
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest
from tokenwire.v1 import generate_pb2 as messages, server_pb2
from tokenwire.v1.text_generation_grpc import TextGenerationServiceStub

_, address, prompt = sys.argv
host, port = address.split(":")
few = messages.GenerateParameters(max_new_tokens=6, details=True)
wrong = messages.GenerateParameters(top_k=-1)


async def failure(call):
    try:
        await call
    except GRPCError as error:
        info = next(d for d in error.details if isinstance(d, error_details_pb2.ErrorInfo))
        bad = next(d for d in error.details if isinstance(d, error_details_pb2.BadRequest))
        fields = [violation.field for violation in bad.field_violations]
        return [error.status.name, error.message, info.reason, fields]


async def main():
    channel = Channel(host, int(port))
    stub = TextGenerationServiceStub(channel)
    request = messages.GenerateRequest(inputs=prompt, parameters=few)
    reply = await stub.Generate(request)
    stream = await stub.GenerateStream(request)
    await stub.Health(server_pb2.HealthRequest())
    health = await HealthStub(channel).Check(HealthCheckRequest())
    refused = messages.GenerateRequest(inputs=prompt, parameters=wrong)
    found = {
        "text": reply.generated_text,
        "ids": [token.id for token in reply.details.tokens],
        "streamed": [message.token.id for message in stream],
        "last": stream[-1].generated_text,
        "health": health.status,
        "refused": await failure(stub.Generate(refused)),
        "refused stream": await failure(stub.GenerateStream(refused)),
    }
    channel.close()
    return found


print(json.dumps(asyncio.run(main())))
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the messages, and of the stubs that grpclib's plug-in makes."""
    folder = tmp_path_factory.mktemp("grpclib")
    plugin = f"--plugin=protoc-gen-grpclib_python={PLUGIN}"
    protoc(plugin, f"--python_out={folder}", f"--grpclib_python_out={folder}")
    return folder


@pytest.fixture(scope="module", params=["direct", "envoy"])
def found(request: pytest.FixtureRequest, stack: Stack, stubs: Path) -> dict[str, Any]:
    """What `SCRIPT` printed about an address."""
    address = stack.grpc_address if request.param == "direct" else stack.address
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, address, PROMPT],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd=stubs,
        env={**os.environ, "PYTHONPATH": str(stubs)},
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_text_is_generated_whole_and_in_a_stream(stack: Stack, found: dict[str, Any]) -> None:
    expected = stack.generate(max_new_tokens=6)
    ids = [token["id"] for token in expected["details"]["tokens"]]
    assert (found["text"], found["last"]) == (expected["generated_text"],) * 2
    assert (found["ids"], found["streamed"]) == (ids, ids)


def test_health_is_serving(found: dict[str, Any]) -> None:
    assert found["health"] == 1


@pytest.mark.parametrize("call", ["refused", "refused stream"])
def test_errors_have_their_details(found: dict[str, Any], call: str) -> None:
    status, message, reason, fields = found[call]
    assert (status, reason, fields) == ("INVALID_ARGUMENT", "VALIDATION", ["parameters.top_k"])
    assert message == "Input validation error: `top_k` must be strictly positive"
