"""What balancers ask: how busy the server is, and what it can hold."""

from __future__ import annotations

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import ENDLESS, PROMPT, Stack


@pytest.fixture(params=["direct", "envoy"])
def api(request: pytest.FixtureRequest, stack: Stack) -> ReflectionClient:
    """A client of the service's port, and one of the gateway's."""
    return ReflectionClient(stack.direct if request.param == "direct" else stack.through_envoy)


def test_load_follows_the_streams_that_run(stack: Stack, api: ReflectionClient) -> None:
    stack.wait_until_idle()
    idle = api.call("GetLoad")
    assert (idle.running, idle.waiting) == (0, 0)
    parameters = {**ENDLESS, "max_new_tokens": 2000}
    calls = [
        api.call("GenerateStream", {"inputs": f"{PROMPT} {i}", "parameters": parameters})
        for i in range(3)
    ]
    try:
        stack.wait_until_running(3)
        busy = api.call("GetLoad")
        assert busy.running == 3
        assert 0 < busy.kv_cache_use <= 1
        assert busy.tokens_per_second > 0
    finally:
        for call in calls:
            call.cancel()
    stack.wait_until_idle()


def test_load_has_no_rest_path(stack: Stack) -> None:
    reply = stack.http.post("/tokenwire.v1.TextGenerationService/GetLoad", json={})
    assert reply.status_code == 404


def test_info_says_what_token_ids_there_are(api: ReflectionClient) -> None:
    info = api.call("Info")
    assert info.context_length >= info.max_total_tokens
    [end, *_] = info.eos_token_ids
    assert end < info.vocab_size
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}
    body["parameters"]["stop_token_ids"] = [info.vocab_size - 1]
    api.call("Generate", body)
    body["parameters"]["stop_token_ids"] = [info.vocab_size]
    with pytest.raises(grpc.RpcError, match="stop_token_ids"):
        api.call("Generate", body)
