"""The metrics of a real server: TGI's dashboard, our own, the rules, and what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.deploy.monitoring import Selector, expressions, selectors
from tests.e2e.exposition import Family, families, matching
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import (
    ENDLESS,
    PROMPT,
    Stack,
    StartError,
    running,
    wait_until,
)
from tests.paths import REPOSITORY

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

PREFILL = (("method", "prefill"),)
DECODE = (("method", "decode"),)

# The panels of TGI's dashboard (assets/tgi_grafana.json), with the series they ask for.
TGI_PANELS = [
    ("Time to first token", "tgi_request_queue_duration_bucket", ()),
    ("Time to first token", "tgi_batch_inference_duration_bucket", PREFILL),
    ("Decode per-token latency", "tgi_batch_forward_duration_bucket", DECODE),
    ("Throughput (generated tok/s)", "tgi_request_generated_tokens_sum", ()),
    ("Throughput (generated tok/s)", "tgi_request_generated_tokens_count", ()),
    ("Number of tokens per prompt", "tgi_request_input_length_bucket", ()),
    ("Number of generated tokens per request", "tgi_request_generated_tokens_bucket", ()),
    ("Requests", "tgi_request_success", ()),
    ("Requests", "tgi_request_failure", (("err", "validation"),)),
    ("Mean Time Per Token", "tgi_request_mean_time_per_token_duration_bucket", ()),
    ("Number of replicas", "tgi_request_count", ()),
    ("Queue Size", "tgi_queue_size", ()),
    ("Max tokens per batch", "tgi_batch_current_max_tokens", ()),
    ("Speculated Tokens", "tgi_request_skipped_tokens_bucket", ()),
    ("Prompt Tokens", "tgi_request_input_length_bucket", ()),
    ("Latency quantiles", "tgi_request_duration_bucket", ()),
    ("Batch Size", "tgi_batch_current_size", ()),
    ("Concatenates", "tgi_batch_concat", (("reason", "backpressure"),)),
    ("Queue quantiles", "tgi_request_queue_duration_bucket", ()),
    ("Prefill Quantiles and Latency", "tgi_batch_inference_duration_bucket", PREFILL),
    ("Decode quantiles and Latency", "tgi_batch_inference_duration_bucket", DECODE),
    ("Forward quantiles and Latency", "tgi_batch_forward_duration_bucket", DECODE),
    ("Token Decode quantiles and Latency", "tgi_batch_decode_duration_bucket", DECODE),
    ("Filter Batch quantiles and Latency", "tgi_batch_filter_duration_bucket", DECODE),
    ("Batch Concat quantiles and latency", "tgi_batch_concat_duration_bucket", DECODE),
]


@pytest.fixture(scope="module")
def busy(stack: Stack) -> str:
    """The exposition of a server that computes, after some traffic of every kind."""
    stack.generate()
    stack.generate(grammar={"type": "regex", "value": "[0-9]{3}"})
    body = {"inputs": PROMPT, "parameters": {"temperature": -1}}
    assert stack.http.post("/generate", json=body).status_code == 422
    call = ReflectionClient(stack.direct).call(
        "GenerateStream", {"inputs": PROMPT, "parameters": ENDLESS}
    )
    try:
        next(call)
        stack.generate("Another one joins.")
        stack.wait_until_running(1)
        return stack.http.get("/metrics").raise_for_status().text
    finally:
        call.cancel()
        stack.wait_until_idle()


@pytest.fixture(scope="module")
def found(busy: str) -> dict[str, Family]:
    """The same, read."""
    return families(busy)


@pytest.mark.parametrize(("panel", "name", "labels"), TGI_PANELS)
def test_each_panel_of_tgis_dashboard_shows_something(
    found: dict[str, Family], panel: str, name: str, labels: tuple[tuple[str, str], ...]
) -> None:
    samples = matching(found, Selector(name, labels))
    assert samples, panel
    is_idle = name == "tgi_queue_size"
    assert is_idle or max(item.value for item in samples) > 0, panel


def test_all_reasons_of_tgi_are_shown(found: dict[str, Family]) -> None:
    errors = {item.labels["err"] for item in matching(found, Selector("tgi_request_failure"))}
    assert {"overloaded", "validation", "generation", "incomplete", "dropped"} <= errors
    reasons = {item.labels["reason"] for item in matching(found, Selector("tgi_batch_concat"))}
    assert reasons == {"backpressure", "wait_exceeded"}


def test_the_batch_has_room_for_what_its_requests_may_come_to(found: dict[str, Family]) -> None:
    (most,) = matching(found, Selector("tgi_batch_current_max_tokens"))
    assert 2000 < most.value < 2100  # a prompt, and ENDLESS tokens


def test_each_series_of_dashboard_and_rules_is_there(found: dict[str, Family]) -> None:
    wanted = {selector for text in expressions() for selector in selectors(text)}
    assert len(wanted) > 40
    assert [item for item in sorted(wanted, key=str) if not matching(found, item)] == []


def test_labels_of_dashboard_and_rules_are_those_of_the_series(found: dict[str, Family]) -> None:
    for text in expressions():
        given = {name for item in selectors(text) for name in _labels(found, item)}
        for names in re.findall(r"\bby \(([^)]*)\)", text):
            asked = {name.strip() for name in names.split(",")} - {"job", "instance", "le"}
            assert asked <= given, text


def _labels(found: dict[str, Family], selector: Selector) -> set[str]:
    return {name for item in matching(found, selector) for name in item.labels}


def test_the_page_describes_each_series(found: dict[str, Family]) -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    row = r"^\| `((?:tgi|tokenwire|grpc|process|python)_\w+)` \| (\w+) \|([^|]*)\|[^|]*\|[^|]*\|"
    described = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(row, page, re.MULTILINE)
    }
    assert {name: (family.kind, family.labels) for name, family in found.items()} == described


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_promtool_objects_only_to_names_that_are_tgis(busy: str) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=busy, capture_output=True, text=True, check=False
    )
    objections = [line for line in (done.stdout + done.stderr).splitlines() if line]
    assert [line for line in objections if not line.startswith("tgi_")] == []
    assert any(line.startswith("tgi_request_count ") for line in objections)  # so it has looked


def test_prometheus_gets_openmetrics_with_the_traces_of_requests(stack: Stack) -> None:
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
    stack.http.post("/generate", json=body, headers=headers).raise_for_status()
    reply = stack.http.get("/metrics", headers={"accept": OPENMETRICS}).raise_for_status()
    assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    shown = list(text_string_to_metric_families(reply.text))
    traced = {
        family.name
        for family in shown
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels == {"trace_id": TRACE}
    }
    assert {"tgi_request_duration", "tokenwire_time_to_first_token_seconds"} <= traced
    plain = families(stack.http.get("/metrics").text)
    names = {sample.name for family in shown for sample in family.samples}
    assert names == {name for family in plain.values() for name in family.samples}


def test_grpc_callers_ask_for_openmetrics_too(direct_api: ReflectionClient) -> None:
    reply = direct_api.call("Metrics", metadata={"accept": "application/openmetrics-text"})
    assert reply.content_type.startswith("application/openmetrics-text")
    assert reply.data.endswith(b"# EOF\n")


def test_tokens_are_counted_while_they_come(stack: Stack) -> None:
    names = ("tokenwire_generated_tokens_total", "tokenwire_inter_token_latency_seconds_count")
    before = [stack.metric(name) for name in names]
    succeeded = stack.metric("tgi_request_success")
    call = ReflectionClient(stack.direct).call(
        "GenerateStream", {"inputs": PROMPT, "parameters": ENDLESS}
    )
    try:
        for name, value in zip(names, before, strict=True):
            wait_until(lambda: stack.metric(name) > value + 10, f"10 more of {name}")  # noqa: B023
        assert stack.metric("tgi_request_success") == succeeded
    finally:
        call.cancel()
    stack.wait_until_idle()


def test_first_tokens_and_prompts_are_counted_once_per_request(stack: Stack) -> None:
    names = (
        "tokenwire_time_to_first_token_seconds_count",
        "tokenwire_generated_tokens_total",
        "tokenwire_prefix_cache_queries_total",
    )
    before = [stack.metric(name) for name in names]
    reply = stack.generate("A prompt that is counted.", max_new_tokens=5, ignore_eos=True)
    num_prompt = stack.http.post("/tokenize", json={"inputs": "A prompt that is counted."})
    after = [stack.metric(name) for name in names]
    grown = [now - then for then, now in zip(before, after, strict=True)]
    assert grown == [1, reply["details"]["generated_tokens"], len(num_prompt.json())]


def test_permits_in_use_and_their_limit_are_shown(stack: Stack) -> None:
    limit = stack.http.get("/info").json()["max_concurrent_requests"]
    assert stack.metric("tokenwire_requests_limit") == limit
    assert stack.metric("tokenwire_requests_active") == 0
    call = ReflectionClient(stack.direct).call(
        "GenerateStream", {"inputs": PROMPT, "parameters": ENDLESS}
    )
    try:
        next(call)
        assert stack.metric("tokenwire_requests_active") == 1
    finally:
        call.cancel()
    wait_until(lambda: stack.metric("tokenwire_requests_active") == 0, "no permit in use")


def test_an_exporter_that_there_is_not_ends_the_start(tmp_path: Path) -> None:
    environment = {**os.environ, "OTEL_METRICS_EXPORTER": "console"}
    with pytest.raises(StartError) as failed, running(tmp_path / "log", environment=environment):
        pass
    assert "OTEL_METRICS_EXPORTER must be otlp or none. Given: console" in str(failed.value)
    assert "Traceback" not in str(failed.value)
