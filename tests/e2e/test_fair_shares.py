"""One caller with a great deal of work, and another with little."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient, retry_seconds
from tests.e2e.stack import ENDLESS, PROMPT, Stack, running

GREEDY, MODEST = {"x-tenant": "greedy"}, {"x-tenant": "modest"}
LONG = {"inputs": PROMPT, "parameters": ENDLESS}
SHORT = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
TOO_MANY = "Model is overloaded: one caller may have 2 requests at a time"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Stack]:
    flags = ("--max-concurrent-requests-per-caller=2", "--max-batch-size=2")
    with running(tmp_path / "log", *flags) as stack:
        yield stack


def test_one_caller_has_its_permits_and_its_share_of_the_places(server: Stack) -> None:
    """The greedy caller fills all places of the batch: it gives one up, and loses nothing."""
    api = ReflectionClient(server.direct)
    streams = [api.call("GenerateStream", LONG, metadata=GREEDY) for _ in range(2)]
    server.wait_until_running(2)
    with pytest.raises(grpc.RpcError) as refused:
        api.call("Generate", SHORT, metadata=GREEDY)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.details() == TOO_MANY
    assert 1 <= (retry_seconds(refused.value) or 0) <= 60
    over_rest = server.http.post("/generate", json=SHORT, headers=GREEDY)
    assert over_rest.status_code == 429
    assert over_rest.json() == {"error": TOO_MANY, "error_type": "overloaded"}
    assert 1 <= int(over_rest.headers["retry-after"]) <= 60

    assert server.http.post("/generate", json=SHORT, headers=MODEST).status_code == 200
    assert len(api.call("Generate", SHORT, metadata=MODEST).token_ids) == 3
    texts = {[*stream][-1].generated_text for stream in streams}
    assert len(texts) == 1, "the same request with the same seed, preempted or not"
