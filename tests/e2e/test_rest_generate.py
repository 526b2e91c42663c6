"""`/generate` and `/` without a stream: status, headers, bytes and the meaning of parameters."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e import shapes
from tests.e2e.rest_replies import (
    GENERATION_HEADERS,
    check_generation_headers,
    custom_headers,
    post,
)
from tests.e2e.stack import ENDLESS, PROMPT, Stack

PARAMETERS = {"max_new_tokens": 6, "details": True}


def test_generate_without_details_is_only_text(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
    reply = post(stack, "/generate", body)
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == {*GENERATION_HEADERS, "x-compute-time"}
    check_generation_headers(reply, characters=len(PROMPT))
    assert list(reply.json()) == ["generated_text"]
    assert reply.content.startswith(b'{"generated_text":"')  # compact, as serde writes it


def test_generate_with_details(stack: Stack) -> None:
    reply = post(stack, "/generate", {"inputs": PROMPT, "parameters": PARAMETERS})
    body = reply.json()
    assert list(body) == ["generated_text", "details"]
    shapes.check_details(body["details"])
    assert body["details"]["prefill"] == []
    assert b'"seed":null' in reply.content
    tokens = body["details"]["tokens"]
    assert body["generated_text"] == "".join(t["text"] for t in tokens if not t["special"])
    assert reply.headers["x-generated-tokens"] == str(len(tokens))
    num_prompt_tokens = len(post(stack, "/tokenize", {"inputs": PROMPT}).json())
    assert reply.headers["x-prompt-tokens"] == str(num_prompt_tokens)


def test_decoder_input_details_are_the_tokens_of_the_prompt(stack: Stack) -> None:
    # Two requests: for the second one the prompt is in the prefix cache.
    replies = [stack.generate(details=False, decoder_input_details=True) for _ in range(2)]
    ids = [t["id"] for t in post(stack, "/tokenize", {"inputs": PROMPT}).json()]
    for reply in replies:
        shapes.check_details(reply["details"])
        assert [token["id"] for token in reply["details"]["prefill"]] == ids


def test_top_n_tokens_are_ordered_and_contain_the_chosen_token(stack: Stack) -> None:
    details = stack.generate(top_n_tokens=3)["details"]
    shapes.check_details(details, extra=("top_tokens",))
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) >= 3
        logprobs = [item["logprob"] for item in top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert top[0] == token  # greedy
        for item in top:
            shapes.check_token(item)


def test_best_of_returns_the_losing_sequences(stack: Stack) -> None:
    reply = stack.generate(best_of=2, do_sample=True, top_n_tokens=1)
    winner = reply["details"]
    shapes.check_details(winner, extra=("best_of_sequences", "top_tokens"), seeded=True)
    (loser,) = winner["best_of_sequences"]
    assert list(loser) == [
        "generated_text",
        "finish_reason",
        "generated_tokens",
        "seed",
        "prefill",
        "tokens",
        "top_tokens",
    ]
    assert loser["seed"] != winner["seed"]

    def mean(tokens: list[dict[str, Any]]) -> float:
        return sum(token["logprob"] for token in tokens) / len(tokens)

    assert mean(winner["tokens"]) >= mean(loser["tokens"])


def test_greedy_is_deterministic(stack: Stack) -> None:
    assert stack.generate() == stack.generate()


def test_seed_determines_the_text(stack: Stack) -> None:
    def sample(seed: int) -> dict[str, Any]:
        return stack.generate(do_sample=True, temperature=20.0, seed=seed, max_new_tokens=12)

    first, again, other = sample(11), sample(11), sample(12)
    assert first == again
    assert first["details"]["seed"] == 11
    assert first["generated_text"] != other["generated_text"]


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**64 - 1])
def test_seed_keeps_all_64_bits(stack: Stack, seed: int) -> None:
    assert stack.generate(do_sample=True, seed=seed, max_new_tokens=1)["details"]["seed"] == seed


def test_drawn_seed_repeats_its_text(stack: Stack) -> None:
    drawn = stack.generate(do_sample=True, temperature=20.0)
    seed = drawn["details"]["seed"]
    assert stack.generate(do_sample=True, temperature=20.0, seed=seed) == drawn


def test_absent_parameters_sample_and_empty_ones_are_greedy(stack: Stack) -> None:
    count = "tgi_request_max_new_tokens_sum"
    before = stack.metric(count)
    absent = post(stack, "/generate", {"inputs": PROMPT})
    assert stack.metric(count) - before == 100  # the default
    assert list(absent.json()) == ["generated_text"]
    empty = [post(stack, "/generate", {"inputs": PROMPT, "parameters": {}}) for _ in range(2)]
    assert empty[0].content == empty[1].content
    greedy = stack.generate(max_new_tokens=100)
    assert greedy["details"]["seed"] is None
    assert empty[0].json()["generated_text"] == greedy["generated_text"]


def test_stop_sequence_ends_the_text_and_is_part_of_it(stack: Stack) -> None:
    parameters = {**ENDLESS, "max_new_tokens": 8}
    tokens = stack.generate(**parameters)["details"]["tokens"]
    visible = [token["text"] for token in tokens if token["text"] and not token["special"]]
    stop = visible[len(visible) // 2]
    reply = stack.generate(**parameters, stop=["never in any text", stop])
    assert reply["details"]["finish_reason"] == "stop_sequence"
    assert reply["generated_text"].endswith(stop)
    assert reply["details"]["generated_tokens"] < 8


def test_return_full_text_puts_the_prompt_first(stack: Stack) -> None:
    alone, full = stack.generate(), stack.generate(return_full_text=True)
    assert full["generated_text"] == PROMPT + alone["generated_text"]
    assert full["details"] == alone["details"]


def test_truncate_keeps_the_end_of_the_prompt(stack: Stack) -> None:
    ids = [t["id"] for t in post(stack, "/tokenize", {"inputs": PROMPT}).json()]
    prefill = stack.generate(truncate=4, decoder_input_details=True)["details"]["prefill"]
    assert [token["id"] for token in prefill] == [ids[0], *ids[-3:]]


@pytest.mark.parametrize(
    "parameters", [{"repetition_penalty": 1.2}, {"frequency_penalty": 0.5}], ids=str
)
def test_penalties_are_accepted(stack: Stack, parameters: dict[str, float]) -> None:
    shapes.check_details(stack.generate(**parameters)["details"])


@pytest.mark.parametrize(
    "parameters",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.5}, {"typical_p": 0.5}, {"do_sample": True}],
    ids=str,
)
def test_parameters_that_sample_report_a_seed(stack: Stack, parameters: dict[str, float]) -> None:
    shapes.check_details(stack.generate(**parameters)["details"], seeded=True)


def test_top_k_of_one_is_greedy(stack: Stack) -> None:
    greedy, top_k = stack.generate(), stack.generate(top_k=1, seed=3)
    assert top_k["generated_text"] == greedy["generated_text"]
    assert {token["logprob"] for token in top_k["details"]["tokens"]} == {0.0}


def test_characters_are_counted_not_bytes(stack: Stack) -> None:
    text = "¿Qué es 🙂?"
    reply = post(stack, "/generate", {"inputs": text, "parameters": {"max_new_tokens": 1}})
    assert reply.headers["x-compute-characters"] == str(len(text))


def test_compat_generate_answers_a_list_and_echoes_the_prompt(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": PARAMETERS}
    compat, plain = post(stack, "/", body), post(stack, "/generate", body).json()
    assert compat.headers["content-type"] == "application/json"
    assert custom_headers(compat) == {*GENERATION_HEADERS, "x-compute-time"}
    (item,) = compat.json()
    assert item == {**plain, "generated_text": PROMPT + plain["generated_text"]}
    body["parameters"] = {**PARAMETERS, "return_full_text": False}
    assert post(stack, "/", {**body, "stream": False}).json() == [plain]
