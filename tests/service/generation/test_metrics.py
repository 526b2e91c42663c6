"""The Prometheus exposition: TGI's names, labels and buckets."""

from __future__ import annotations

import re

import pytest

from engine.protocol.request import StepOutput
from service.generation.metrics import Metrics
from tests.service.fakes import LIMITS, engine_step, generation, sample


@pytest.fixture
def metrics() -> Metrics:
    """Metrics after one event of each kind."""
    metrics = Metrics(LIMITS)
    metrics.request_begun()
    metrics.request_validated(30, 150)
    metrics.request_failed("overloaded")
    metrics.request_finished(generation())
    metrics.step(
        engine_step(
            num_running=2,
            num_waiting=3,
            num_blocks=10,
            num_free_blocks=4,
            num_preemptions=5,
            num_prompt_tokens=100,
            num_cached_tokens=40,
        )
    )
    metrics.call_begun("/a")
    metrics.call_begun("/a")
    metrics.call_ended("/a", "OK", 0.5)
    return metrics


def types(exposition: bytes) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposition.decode(), re.MULTILINE))


def buckets(exposition: bytes, name: str) -> list[float]:
    pattern = rf'^{name}_bucket{{(?:\w+="\w+",)*le="([^"]+)"'
    return [float(edge) for edge in re.findall(pattern, exposition.decode(), re.MULTILINE)]


def test_names_and_types_are_those_of_tgi(metrics: Metrics) -> None:
    found = types(metrics.exposition())
    counters = ("request_count", "request_success", "request_failure", "batch_inference_count")
    histograms = (
        "request_duration",
        "request_validation_duration",
        "request_queue_duration",
        "request_inference_duration",
        "request_mean_time_per_token_duration",
        "request_input_length",
        "request_max_new_tokens",
        "request_generated_tokens",
        "batch_inference_duration",
        "batch_forward_duration",
    )
    for names, kind in (
        (counters, "counter"),
        (histograms, "histogram"),
        (("queue_size", "batch_current_size"), "gauge"),
    ):
        assert {name: found.get(f"tgi_{name}") for name in names} == dict.fromkeys(names, kind)


def test_there_are_no_suffixes_that_tgi_lacks(metrics: Metrics) -> None:
    text = metrics.exposition().decode()
    assert "_created" not in text
    assert not re.search(r"(?:tgi|grpc)_\w*_total\b", text)


def test_every_sample_has_the_name_of_a_declared_type(metrics: Metrics) -> None:
    text = metrics.exposition().decode()
    known = types(metrics.exposition())
    for line in text.splitlines():
        if not line.startswith("#"):
            name = re.split(r"[{ ]", line)[0]
            assert name in known or re.sub("_(bucket|sum|count)$", "", name) in known, line


def test_durations_have_the_buckets_of_tgi(metrics: Metrics) -> None:
    text = metrics.exposition()
    expected = pytest.approx([0.0001 * 1.5**i for i in range(1, 36)] + [float("inf")])
    for name, kind in types(text).items():
        if kind == "histogram" and name.endswith("duration"):
            assert buckets(text, name) == expected, name
    assert buckets(text, "tgi_request_duration")[0] == pytest.approx(0.00015)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("tgi_request_input_length", LIMITS.max_input_tokens),
        ("tgi_request_max_new_tokens", LIMITS.max_total_tokens),
        ("tgi_request_generated_tokens", LIMITS.max_total_tokens),
    ],
)
def test_lengths_have_a_hundred_buckets_up_to_their_limit(
    metrics: Metrics, name: str, limit: int
) -> None:
    expected = [limit / 100 * part for part in range(1, 101)] + [float("inf")]
    assert buckets(metrics.exposition(), name) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ("tgi_request_count", 1),
        ("tgi_request_success", 1),
        ('tgi_request_failure{err="overloaded"}', 1),
        ("tgi_request_duration_sum", 1.5),
        ("tgi_request_validation_duration_sum", 0.25),
        ("tgi_request_queue_duration_sum", 0.25),
        ("tgi_request_inference_duration_sum", 1.0),
        ("tgi_request_mean_time_per_token_duration_sum", 0.5),
        ("tgi_request_input_length_sum", 30),
        ("tgi_request_max_new_tokens_sum", 150),
        ("tgi_request_generated_tokens_sum", 2),
        ("tgi_queue_size", 3),
        ("tgi_batch_current_size", 2),
        ('tgi_batch_inference_count{method="prefill"}', 1),
        ('tgi_batch_inference_duration_sum{method="prefill"}', 0.5),
        ('tgi_batch_forward_duration_sum{method="prefill"}', 0.25),
        ('tokenwire_kv_blocks{state="free"}', 4),
        ('tokenwire_kv_blocks{state="used"}', 6),
        ("tokenwire_preemptions", 5),
        ('tokenwire_prompt_tokens{source="cache"}', 40),
        ('tokenwire_prompt_tokens{source="computed"}', 60),
        ('grpc_server_in_progress{method="/a"}', 1),
        ('grpc_server_handled{code="OK",method="/a"}', 1),
        ('grpc_server_handling_duration_sum{method="/a"}', 0.5),
    ],
)
def test_events_are_counted(metrics: Metrics, series: str, value: float) -> None:
    assert sample(metrics.exposition(), series) == value


def test_a_heartbeat_is_not_a_step(metrics: Metrics) -> None:
    metrics.step(StepOutput())
    text = metrics.exposition()
    assert sample(text, "tgi_batch_current_size") == 0
    assert sample(text, 'tgi_batch_inference_count{method="prefill"}') == 1
    assert sample(text, 'tgi_batch_inference_count{method="decode"}') == 0
