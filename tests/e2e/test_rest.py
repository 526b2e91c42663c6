"""Every REST path without a stream: status, headers, bytes and meaning of the answers."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.e2e import shapes
from tests.e2e.stack import ENDLESS, PROMPT, Stack

PARAMETERS = {"max_new_tokens": 6, "details": True}
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "temperature": 0.0}
COMPLETION = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0.0}

TIMING_HEADERS = [
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
]
COUNT_HEADERS = [
    "x-compute-characters",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
]
GENERATION_HEADERS = {*TIMING_HEADERS, *COUNT_HEADERS, "x-compute-type"}


def post(stack: Stack, path: str, body: Any) -> httpx.Response:
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply


def custom_headers(reply: httpx.Response) -> set[str]:
    return {name for name in reply.headers if name.startswith("x-")}


def check_generation_headers(reply: httpx.Response, *, characters: int) -> None:
    headers = reply.headers
    assert headers["x-compute-type"] == "1-cpu"
    assert headers["x-compute-characters"] == str(characters)
    for name in TIMING_HEADERS:
        assert float(headers[name]) >= 0
    for name in COUNT_HEADERS:
        assert re.fullmatch(r"\d+", headers[name])


@pytest.mark.parametrize("path", ["/", "/health"])
def test_health_is_200_and_empty(stack: Stack, path: str) -> None:
    reply = stack.http.get(path)
    assert (reply.status_code, reply.content) == (200, b"")
    assert custom_headers(reply) == set()


def test_info_is_the_contracts(stack: Stack) -> None:
    reply = stack.http.get("/info")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == set()
    info = reply.json()
    assert list(info) == [
        "model_id",
        "model_sha",
        "model_dtype",
        "model_device_type",
        "model_pipeline_tag",
        "max_concurrent_requests",
        "max_best_of",
        "max_stop_sequences",
        "max_input_tokens",
        "max_total_tokens",
        "waiting_served_ratio",
        "max_batch_total_tokens",
        "max_waiting_tokens",
        "max_batch_size",
        "validation_workers",
        "max_client_batch_size",
        "router",
        "version",
        "sha",
        "docker_label",
    ]
    assert info["model_id"]
    assert info["model_dtype"].startswith("torch.")
    assert info["model_device_type"] in ("cpu", "cuda")
    assert info["router"] == "text-generation-router"
    assert info["version"] == "2.1.2-dev0"
    assert info["max_concurrent_requests"] == 128
    assert (info["max_best_of"], info["max_stop_sequences"]) == (2, 4)
    assert info["max_input_tokens"] == info["max_total_tokens"] - 1
    assert info["max_client_batch_size"] == 4
    assert b'"waiting_served_ratio":0.3,' in reply.content
    absent = ("model_sha", "model_pipeline_tag", "max_batch_size", "sha", "docker_label")
    assert all(info[name] is None for name in absent)


def test_metrics_are_a_prometheus_exposition_with_tgis_names(stack: Stack) -> None:
    stack.generate()
    reply = stack.http.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", reply.text, re.MULTILINE))
    counters = ["tgi_request_count", "tgi_request_success", "tgi_batch_inference_count"]
    assert {name: types.get(name) for name in counters} == dict.fromkeys(counters, "counter")
    gauges = ["tgi_queue_size", "tgi_batch_current_size", "tokenwire_kv_blocks"]
    assert {name: types.get(name) for name in gauges} == dict.fromkeys(gauges, "gauge")
    histograms = [
        "tgi_request_duration",
        "tgi_request_queue_duration",
        "tgi_request_inference_duration",
        "tgi_request_generated_tokens",
        "tgi_request_input_length",
        "tgi_batch_inference_duration",
    ]
    assert {name: types.get(name) for name in histograms} == dict.fromkeys(histograms, "histogram")
    for line in reply.text.splitlines():
        assert line.startswith("# ") or re.fullmatch(
            r'\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? \S+', line
        )


def test_metrics_count_requests(stack: Stack) -> None:
    stack.generate()  # so that the series are there
    names = ["tgi_request_count", "tgi_request_success", "tgi_request_generated_tokens_sum"]
    before = [stack.metric(name) for name in names]
    num_tokens = stack.generate()["details"]["generated_tokens"]
    after = [stack.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, num_tokens]


def test_tokenize_covers_the_text_with_byte_offsets(stack: Stack) -> None:
    text = "héllo 🙂, what is a cañón?"
    reply = post(stack, "/tokenize", {"inputs": text})
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == set()
    tokens = reply.json()
    raw = text.encode()
    covered = 0
    for token in tokens:
        assert list(token) == ["id", "text", "start", "stop"]
        assert token["text"] == raw[token["start"] : token["stop"]].decode()
        assert token["start"] <= covered
        covered = max(covered, token["stop"])
    assert covered == len(raw)
    assert (tokens[0]["text"], tokens[0]["start"], tokens[0]["stop"]) == ("", 0, 0)


def test_tokenize_ignores_everything_but_the_text(stack: Stack) -> None:
    parameters = {"truncate": 1, "max_new_tokens": 0, "temperature": -1.0}
    loud = post(stack, "/tokenize", {"inputs": PROMPT, "parameters": parameters, "more": [1]})
    assert loud.content == post(stack, "/tokenize", {"inputs": PROMPT}).content


def test_tokenize_takes_an_empty_text(stack: Stack) -> None:
    assert len(post(stack, "/tokenize", {"inputs": ""}).json()) == 1


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


def test_decoder_input_details_are_the_prompts_tokens(stack: Stack) -> None:
    # Twice, since the second time the prompt is in the cache.
    replies = [stack.generate(details=False, decoder_input_details=True) for _ in range(2)]
    ids = [t["id"] for t in post(stack, "/tokenize", {"inputs": PROMPT}).json()]
    for reply in replies:
        shapes.check_details(reply["details"])
        assert [token["id"] for token in reply["details"]["prefill"]] == ids


def test_top_n_tokens_are_ordered_and_hold_the_chosen_one(stack: Stack) -> None:
    details = stack.generate(top_n_tokens=3)["details"]
    shapes.check_details(details, extra=("top_tokens",))
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) >= 3
        logprobs = [item["logprob"] for item in top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert top[0] == token  # greedy
        for item in top:
            shapes.check_token(item)


def test_best_of_reports_the_losers(stack: Stack) -> None:
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


def test_seed_decides(stack: Stack) -> None:
    def sample(seed: int) -> dict[str, Any]:
        return stack.generate(do_sample=True, temperature=20.0, seed=seed, max_new_tokens=12)

    first, again, other = sample(11), sample(11), sample(12)
    assert first == again
    assert first["details"]["seed"] == 11
    assert first["generated_text"] != other["generated_text"]


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**64 - 1])
def test_seed_keeps_all_its_bits(stack: Stack, seed: int) -> None:
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


def test_stop_sequence_ends_and_stays(stack: Stack) -> None:
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
def test_penalties_are_served(stack: Stack, parameters: dict[str, float]) -> None:
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


def test_compat_answers_a_list_and_echoes_the_prompt(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": PARAMETERS}
    compat, plain = post(stack, "/", body), post(stack, "/generate", body).json()
    assert compat.headers["content-type"] == "application/json"
    assert custom_headers(compat) == {*GENERATION_HEADERS, "x-compute-time"}
    (item,) = compat.json()
    assert item == {**plain, "generated_text": PROMPT + plain["generated_text"]}
    body["parameters"] = {**PARAMETERS, "return_full_text": False}
    assert post(stack, "/", {**body, "stream": False}).json() == [plain]


def test_chat_completion(stack: Stack) -> None:
    reply = post(stack, "/v1/chat/completions", CHAT)
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == {*GENERATION_HEADERS, "x-compute-time"}
    body = reply.json()
    shapes.check_chat(body, stack.http.get("/info").json()["model_id"])
    usage = body["usage"]
    assert reply.headers["x-prompt-tokens"] == str(usage["prompt_tokens"])
    assert reply.headers["x-generated-tokens"] == str(usage["completion_tokens"])
    assert int(reply.headers["x-compute-characters"]) > len(PROMPT)  # of the whole template
    again = post(stack, "/v1/chat/completions", CHAT).json()
    assert again["choices"] == body["choices"]


def test_chat_logprobs(stack: Stack) -> None:
    wanted = {**CHAT, "logprobs": True, "top_logprobs": 2}
    body = post(stack, "/v1/chat/completions", wanted).json()
    shapes.check_chat(body, body["model"], logprobs=True, num_top=2)
    bare = post(stack, "/v1/chat/completions", {**CHAT, "logprobs": True}).json()
    assert all(not item["top_logprobs"] for item in bare["choices"][0]["logprobs"]["content"])


def test_chat_content_may_be_parts(stack: Stack) -> None:
    middle = len(PROMPT) // 2
    parts = [{"type": "text", "text": text} for text in (PROMPT[:middle], PROMPT[middle:])]
    split = {**CHAT, "messages": [{"role": "user", "content": parts}]}
    assert (
        post(stack, "/v1/chat/completions", split).json()["choices"]
        == post(stack, "/v1/chat/completions", CHAT).json()["choices"]
    )


def test_chat_seed_decides(stack: Stack) -> None:
    wanted = {**CHAT, "temperature": 20.0, "max_tokens": 12}
    first, again, other = (
        post(stack, "/v1/chat/completions", {**wanted, "seed": seed}).json()["choices"]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_completion(stack: Stack) -> None:
    reply = post(stack, "/v1/completions", COMPLETION)
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == GENERATION_HEADERS  # no x-compute-time, as in TGI
    check_generation_headers(reply, characters=len(PROMPT))
    body = reply.json()
    shapes.check_completion(body, stack.http.get("/info").json()["model_id"], 1)
    expected = stack.generate(max_new_tokens=6)
    assert body["choices"][0]["text"] == expected["generated_text"]
    assert body["choices"][0]["finish_reason"] == expected["details"]["finish_reason"]


def test_completion_of_several_prompts(stack: Stack) -> None:
    prompts = [PROMPT, "The capital of France is", "1, 2, 3,"]
    reply = post(stack, "/v1/completions", {**COMPLETION, "prompt": prompts})
    body = reply.json()
    shapes.check_completion(body, body["model"], len(prompts))
    check_generation_headers(reply, characters=sum(map(len, prompts)))
    single = [
        post(stack, "/v1/completions", {**COMPLETION, "prompt": prompt}).json()
        for prompt in prompts
    ]
    assert [choice["text"] for choice in body["choices"]] == [
        item["choices"][0]["text"] for item in single
    ]
    assert body["usage"]["total_tokens"] == sum(item["usage"]["total_tokens"] for item in single)


def test_null_means_absent(stack: Stack) -> None:
    names = ["best_of", "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p"]
    names += ["typical_p", "return_full_text", "truncate", "seed", "top_n_tokens", "grammar"]
    nulls = dict.fromkeys([*names, "adapter_id"])
    assert stack.generate(**nulls, stop=[]) == stack.generate()


def test_unknown_fields_are_ignored_at_every_level(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": {**PARAMETERS, "new": {"a": [1]}}, "more": None}
    plain = {"inputs": PROMPT, "parameters": PARAMETERS}
    assert post(stack, "/generate", body).content == post(stack, "/generate", plain).content


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"],
)
def test_json_content_types(stack: Stack, content_type: str) -> None:
    reply = stack.http.post(
        "/tokenize",
        content=json.dumps({"inputs": PROMPT}),
        headers={"content-type": content_type},
    )
    assert reply.status_code == 200


def test_pages_of_other_origins_may_read_the_answer(stack: Stack) -> None:
    reply = stack.http.get("/info", headers={"origin": "https://example.org"})
    assert reply.headers["access-control-allow-origin"] == "*"
