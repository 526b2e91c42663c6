"""REST paths that generate nothing, and what holds for the JSON of all of them."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.rest_replies import custom_headers, post
from tests.e2e.stack import PROMPT, Stack

PARAMETERS = {"max_new_tokens": 6, "details": True}
INFO_KEYS = [
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


@pytest.mark.parametrize("path", ["/", "/health"])
def test_health_is_200_and_empty(stack: Stack, path: str) -> None:
    reply = stack.http.get(path)
    assert (reply.status_code, reply.content) == (200, b"")
    assert custom_headers(reply) == {"x-request-id"}


def test_info_has_the_fields_of_the_contract(stack: Stack) -> None:
    reply = stack.http.get("/info")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == {"x-request-id"}
    info = reply.json()
    assert 0.0 <= info.pop("replayed_share", 0.0) <= 1.0  # ours, absent before the first step
    assert list(info) == INFO_KEYS
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


def test_metrics_are_prometheus_text_with_the_names_of_tgi(stack: Stack) -> None:
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
    stack.generate()  # a series exists after its first request
    names = ["tgi_request_count", "tgi_request_success", "tgi_request_generated_tokens_sum"]
    before = [stack.metric(name) for name in names]
    num_tokens = stack.generate()["details"]["generated_tokens"]
    after = [stack.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, num_tokens]


def test_tokenize_covers_the_text_with_byte_offsets(stack: Stack) -> None:
    text = "héllo 🙂, what is a cañón?"
    reply = post(stack, "/tokenize", {"inputs": text})
    assert reply.headers["content-type"] == "application/json"
    assert custom_headers(reply) == {"x-request-id"}
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


def test_tokenize_ignores_all_other_fields(stack: Stack) -> None:
    parameters = {"truncate": 1, "max_new_tokens": 0, "temperature": -1.0}
    reply = post(stack, "/tokenize", {"inputs": PROMPT, "parameters": parameters, "more": [1]})
    assert reply.content == post(stack, "/tokenize", {"inputs": PROMPT}).content


def test_tokenize_takes_an_empty_text(stack: Stack) -> None:
    assert len(post(stack, "/tokenize", {"inputs": ""}).json()) == 1


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
def test_content_types_of_json_are_accepted(stack: Stack, content_type: str) -> None:
    reply = stack.http.post(
        "/tokenize",
        content=json.dumps({"inputs": PROMPT}),
        headers={"content-type": content_type},
    )
    assert reply.status_code == 200


def test_pages_of_other_origins_may_read_the_answer(stack: Stack) -> None:
    reply = stack.http.get("/info", headers={"origin": "https://example.org"})
    assert reply.headers["access-control-allow-origin"] == "*"
