"""A request gives the same tokens alone, among others, over REST or gRPC, and after preemption."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import ENDLESS, PROMPT, Stack, running

NUM_OTHERS = 32  # concurrent streams
SAMPLED: dict[str, Any] = {
    "greedy": {},
    "seeded": {"do_sample": True, "seed": 7},
    "hot": {"temperature": 20.0, "seed": 2**64 - 1},
    "flat": {"temperature": 1e6, "seed": 2},
    "filtered": {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "typical_p": 0.95, "seed": 0},
    "penalised": {
        "temperature": 5.0,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "seed": 2**53 + 1,
    },
}
# With blocks of 16 tokens. Each of the texts fits into the cache alone, four of them do not.
SMALL_CACHE = ("--max-total-tokens=192", "--max-batch-total-tokens=256", "--block-size=16")

Tokens = list[tuple[int, str]]  # ids and texts


def request(
    parameters: dict[str, Any], inputs: str = PROMPT, num_tokens: int = 12
) -> dict[str, Any]:
    """A body for /generate, with details."""
    given = {"max_new_tokens": num_tokens, "details": True, **parameters}
    return {"inputs": inputs, "parameters": given}


def over_rest(stack: Stack, body: dict[str, Any]) -> Tokens:
    """The tokens of a generation over REST."""
    reply = stack.http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return [(token["id"], token["text"]) for token in reply.json()["details"]["tokens"]]


def over_grpc(stack: Stack, body: dict[str, Any]) -> Tokens:
    """The tokens of a generation over gRPC."""
    message = ReflectionClient(stack.direct).call("Generate", body)
    return [(token.id, token.text) for token in message.details.tokens]


def over_both(stack: Stack, body: dict[str, Any]) -> Tokens:
    """The tokens of a generation, checked to be the same over REST and gRPC."""
    found = over_rest(stack, body)
    assert over_grpc(stack, body) == found
    return found


@contextmanager
def other_streams(stack: Stack) -> Iterator[None]:
    """`NUM_OTHERS` streams with different prompts, which run during the whole block."""
    api = ReflectionClient(stack.direct)
    calls = []
    for index in range(NUM_OTHERS):
        body = request({**ENDLESS, "top_n_tokens": index % 3}, f"{PROMPT} {index}", 2000)
        calls.append(api.call("GenerateStream", body))
    try:
        stack.wait_until_running(NUM_OTHERS)
        yield
        assert stack.metric("tgi_batch_current_size") >= NUM_OTHERS
    finally:
        for call in calls:
            call.cancel()
    stack.wait_until_idle()


def test_other_streams_do_not_change_tokens(stack: Stack) -> None:
    bodies = [request(parameters) for parameters in SAMPLED.values()]
    alone = [over_both(stack, body) for body in bodies]
    with other_streams(stack):
        assert [over_rest(stack, body) for body in bodies] == alone
        assert [over_grpc(stack, body) for body in bodies] == alone
    assert [over_both(stack, body) for body in bodies] == alone


def test_other_streams_do_not_change_tokens_of_the_openai_paths(stack: Stack) -> None:
    openai = {"max_tokens": 12, "temperature": 20.0, "seed": 5}
    requests = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], **openai},
        "/v1/completions": {"prompt": [PROMPT, "One, two,", PROMPT], **openai},
    }

    def choices(path: str) -> Any:
        return stack.http.post(path, json=requests[path]).raise_for_status().json()["choices"]

    alone = {path: choices(path) for path in requests}
    first, _, third = (choice["text"] for choice in alone["/v1/completions"])
    assert first == third  # one seed for all prompts
    with other_streams(stack):
        assert {path: choices(path) for path in requests} == alone


def test_other_seeds_give_other_tokens(stack: Stack) -> None:
    texts = [over_rest(stack, request({"temperature": 20.0, "seed": seed})) for seed in range(8)]
    assert len({tuple(text) for text in texts}) == len(texts)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server whose cache holds 256 tokens."""
    with running(tmp_path_factory.mktemp("cache") / "log", *SMALL_CACHE) as stack:
        yield stack


def test_preemption_does_not_change_tokens(small: Stack) -> None:
    bodies = [
        request(parameters, prompt, 150 - 10 * index)
        for index, parameters in enumerate(SAMPLED.values())
        for prompt in (PROMPT, "Once upon a time there was")
    ]
    alone = [over_both(small, body) for body in bodies]
    assert max(len(tokens) for tokens in alone) > 100
    before = small.metric("tokenwire_preemptions_total")
    assert before == 0  # a single sequence is never preempted
    with ThreadPoolExecutor(2 * len(bodies)) as pool:
        rest = [pool.submit(over_rest, small, body) for body in bodies]
        typed = [pool.submit(over_grpc, small, body) for body in bodies]
        assert [future.result() for future in rest] == alone
        assert [future.result() for future in typed] == alone
    assert small.metric("tokenwire_preemptions_total") >= 5
    small.wait_until_idle()
