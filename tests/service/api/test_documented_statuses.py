"""Failures that a real engine does not have on demand, and the statuses documented for them.

That Envoy turns `x-http-status` and `x-error-body` into a reply is tested in tests/envoy.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.errors import ErrorKind
from tests.paths import REPOSITORY
from tests.service.api.golden_service import BREAKS_OFF, answer
from tests.service.fakes import Script, script, step, trailers

BODIES: dict[str, dict[str, Any]] = {
    "Generate": {"inputs": "x"},
    "CompatGenerate": {"inputs": "x"},
    "Chat": {"messages": [{"role": "user", "content": "x"}]},
    "Completions": {"prompt": ["x", "y"]},
    "Responses": {"input": "x"},
    "Invocations": {"inputs": "x"},
}
FAILURES: list[tuple[Script, int, str, str]] = [
    (BREAKS_OFF, 500, "incomplete_generation", "Incomplete generation"),
    (
        script(step(error="bad luck")),
        424,
        "generation",
        "Request failed during generation: Server error: bad luck",
    ),
    (script(RuntimeError("a defect")), 500, "internal", "Internal server error"),
]


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize(("engine_script", "status", "error_type", "error"), FAILURES)
async def test_failed_generation(
    name: str, engine_script: Script, status: int, error_type: str, error: str
) -> None:
    failed = trailers((await answer(name, BODIES[name], engine_script)).failure)
    assert failed["x-http-status"] == str(status)
    assert json.loads(failed["x-error-body"]) == {"error": error, "error_type": error_type}


@pytest.mark.parametrize("name", BODIES)
async def test_full_server(name: str) -> None:
    result = await answer(name, BODIES[name], BREAKS_OFF, full=True)
    failed = trailers(result.failure)
    assert (failed["x-http-status"], failed["retry-after"]) == ("429", "1")


@pytest.mark.parametrize("kind", ErrorKind, ids=lambda kind: kind.name)
def test_every_kind_of_error_is_in_the_table_of_statuses(kind: ErrorKind) -> None:
    lines = (REPOSITORY / "docs" / "statuses.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{kind.name}` |"))
    _, _, error_type, status, code, *_ = (cell.strip() for cell in row.split("|"))
    assert error_type == f"`{kind.error_type}`"
    assert status.split(",")[0] == str(kind.http_status)
    assert code.split(",")[0] in (kind.grpc_code.name, "—")  # no message can be broken JSON
