"""The Prometheus exposition: TGI's names, labels and buckets, and our own series."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from engine.protocol.request import EngineStats, SequenceOutput, StepOutput, Token
from service.call_record import begin_record
from service.generation.call_series import MAX_CALLERS
from service.generation.metrics import Metrics
from service.generation.tally import Pace, Tally
from service.metrics.exposition import OPENMETRICS_TYPE
from tests.service.fakes import LIMITS, SERVER, engine_step, generation, sample

TRACE = "0af7651916cd43dd8448eb211c80319c"


def token(**changes: object) -> SequenceOutput:
    """A step's output for one request."""
    return SequenceOutput("a", Token(5, -0.5))._replace(**changes)


@pytest.fixture
def metrics() -> Metrics:
    """Metrics after one event of each kind."""
    metrics = Metrics(LIMITS, speculate=3)
    metrics.requests.begun()
    metrics.requests.validated(30, 150)
    metrics.requests.failed("overloaded", 0.5)
    metrics.requests.finished(generation())
    metrics.engine.step(
        replace(
            engine_step(
                num_running=2,
                num_waiting=3,
                num_blocks=10,
                num_free_blocks=4,
                num_preemptions=5,
                max_running_tokens=300,
            ),
            num_seqs=2,
            num_started_seqs=1,
            sample_s=0.125,
            collect_s=0.0625,
            release_s=0.03125,
            schedule_s=0.75,
        )
    )
    metrics.requests.step(first_tokens())
    metrics.requests.step(later_tokens())
    metrics.grammar_tried("compiled", 0.5)
    metrics.grammar_known()
    metrics.calls.begun("/a")
    metrics.calls.begun("/a")
    metrics.calls.ended("/a", "OK", 0.5)
    metrics.describe(SERVER)
    return metrics


def first_tokens() -> Tally:
    """A request of 100 prompt tokens gets its first token, 2 s after it came."""
    tally = Tally(now=12.0)
    tally.add(Pace(10.0, 100), token(first_scheduled=True, num_cached_tokens=40))
    return tally


def later_tokens() -> Tally:
    """Three requests get a token each, 0.5 s after the last, and two of them more than one."""
    tally = Tally(now=12.5)
    for has_grammar, count in ((False, 1), (False, 3), (True, 2)):
        pace = Pace(10.0, 100, has_grammar, last=12.0)
        for _ in range(count):
            tally.add(pace, token())
    return tally


def types(exposition: bytes) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposition.decode(), re.MULTILINE))


def buckets(exposition: bytes, name: str) -> list[float]:
    pattern = rf'^{name}_bucket{{le="([^"]+)"(?:,method="decode")?}}'
    return [float(edge) for edge in re.findall(pattern, exposition.decode(), re.MULTILINE)]


def test_names_and_types_are_those_of_tgi(metrics: Metrics) -> None:
    found = types(metrics.exposition())
    counters = (
        "request_count",
        "request_success",
        "request_failure",
        "batch_inference_count",
        "batch_inference_success",
        "batch_inference_failure",
        "batch_concat",
    )
    histograms = (
        "request_duration",
        "request_validation_duration",
        "request_queue_duration",
        "request_inference_duration",
        "request_mean_time_per_token_duration",
        "request_input_length",
        "request_max_new_tokens",
        "request_generated_tokens",
        "request_skipped_tokens",
        "batch_next_size",
        "batch_inference_duration",
        "batch_forward_duration",
        "batch_decode_duration",
        "batch_filter_duration",
        "batch_concat_duration",
    )
    gauges = ("queue_size", "batch_current_size", "batch_current_max_tokens")
    for names, kind in ((counters, "counter"), (histograms, "histogram"), (gauges, "gauge")):
        assert {name: found.get(f"tgi_{name}") for name in names} == dict.fromkeys(names, kind)
    known = {f"tgi_{name}" for name in (*counters, *histograms, *gauges)}
    assert {name for name in found if name.startswith("tgi_")} == known


def test_there_are_no_suffixes_that_tgi_lacks(metrics: Metrics) -> None:
    text = metrics.exposition().decode()
    assert "_created" not in text
    assert not re.search(r"tgi_\w*_total\b", text)


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


def test_batch_sizes_and_draft_tokens_have_a_bucket_each(metrics: Metrics) -> None:
    text = metrics.exposition()
    assert buckets(text, "tgi_batch_next_size") == [*range(1, 1025), float("inf")]
    assert buckets(text, "tgi_request_skipped_tokens") == [0, 1, 2, 3, float("inf")]


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
        ("tgi_request_skipped_tokens_count", 4),
        ("tgi_request_skipped_tokens_sum", 2),
        ('tgi_request_skipped_tokens_bucket{le="0.0"}', 3),
        ("tgi_queue_size", 3),
        ("tgi_batch_current_size", 2),
        ("tgi_batch_current_max_tokens", 300),
        ('tgi_batch_next_size_bucket{le="1.0"}', 1),
        ('tgi_batch_concat{reason="backpressure"}', 1),
        ('tgi_batch_concat_duration_sum{method="decode"}', 0.75),
        ('tgi_batch_inference_count{method="prefill"}', 1),
        ('tgi_batch_inference_success{method="prefill"}', 1),
        ('tgi_batch_inference_duration_sum{method="prefill"}', 0.5),
        ('tgi_batch_forward_duration_sum{method="prefill"}', 0.25),
        ('tgi_batch_decode_duration_sum{method="prefill"}', 0.15625),
        ('tgi_batch_filter_duration_sum{method="prefill"}', 0.03125),
        ("tokenwire_time_to_first_token_seconds_sum", 2.0),
        ("tokenwire_inter_token_latency_seconds_count", 3),
        ("tokenwire_inter_token_latency_seconds_sum", 1.5),
        ("tokenwire_generated_tokens_total", 7),
        ("tokenwire_grammar_forced_tokens_total", 1),
        ('tokenwire_prompt_tokens_total{source="cache"}', 40),
        ('tokenwire_prompt_tokens_total{source="computed"}', 60),
        ("tokenwire_prefix_cache_queries_total", 100),
        ("tokenwire_prefix_cache_hits_total", 40),
        ('tokenwire_request_finished_total{reason="length"}', 1),
        ('tokenwire_kv_blocks{state="free"}', 4),
        ('tokenwire_kv_blocks{state="used"}', 6),
        ("tokenwire_kv_cache_usage_ratio", 0.6),
        ("tokenwire_preemptions_total", 5),
        ('tokenwire_grammar_compile_seconds_sum{outcome="compiled"}', 0.5),
        ("tokenwire_grammar_cache_hits_total", 1),
        ('tokenwire_cache_config_info{block_size="4",num_gpu_blocks="100"}', 1),
        ('tokenwire_weights_bytes{rank="0"}', 3000),
        ('tokenwire_kv_cache_bytes{rank="0"}', 2000),
        ('grpc_server_in_progress{method="/a"}', 1),
        ('grpc_server_handled_total{code="OK",method="/a"}', 1),
        ('grpc_server_handling_seconds_sum{method="/a"}', 0.5),
    ],
)
def test_events_are_counted(metrics: Metrics, series: str, value: float) -> None:
    assert sample(metrics.exposition(), series) == value


@pytest.mark.parametrize(
    "series",
    [
        *(
            f'tgi_request_failure{{err="{reason}"}}'
            for reason in ("overloaded", "validation", "template", "generation", "dropped")
        ),
        *(f'tgi_batch_concat{{reason="{reason}"}}' for reason in ("backpressure", "wait_exceeded")),
        *(f'tgi_batch_decode_duration_count{{method="{m}"}}' for m in ("prefill", "decode")),
        'tokenwire_request_finished_total{reason="stop_sequence"}',
        'tokenwire_grammar_compile_seconds_count{outcome="failed"}',
        'tokenwire_calls_total{caller="",code="RESOURCE_EXHAUSTED"}',
        'tokenwire_calls_total{caller="alice",code="OK"}',
        'grpc_server_handled_total{code="UNAVAILABLE",method="/s/Generate"}',
        'grpc_server_handling_seconds_count{method="/s/Generate"}',
        "tokenwire_engine_restarts_total",
        "tokenwire_preemptions_total",
    ],
)
def test_series_are_there_before_anything_happens(series: str) -> None:
    metrics = Metrics(LIMITS)
    metrics.calls.expect_methods(["/s/Generate"])
    metrics.calls.expect_callers(["alice"])
    assert f"\n{series} 0.0\n" in metrics.exposition().decode()


def test_a_heartbeat_is_not_a_step(metrics: Metrics) -> None:
    metrics.engine.step(StepOutput())
    text = metrics.exposition()
    assert sample(text, "tgi_batch_current_size") == 0
    assert sample(text, 'tgi_batch_inference_count{method="prefill"}') == 1
    assert sample(text, 'tgi_batch_inference_count{method="decode"}') == 0


def test_a_batch_that_begins_is_not_merged_with_another() -> None:
    metrics = Metrics(LIMITS)
    metrics.engine.step(replace(engine_step(), num_seqs=3, num_started_seqs=3))
    text = metrics.exposition()
    assert sample(text, 'tgi_batch_next_size_bucket{le="2.0"}') == 0
    assert sample(text, 'tgi_batch_next_size_bucket{le="3.0"}') == 1
    assert sample(text, 'tgi_batch_concat{reason="backpressure"}') == 0
    assert sample(text, 'tgi_batch_concat_duration_count{method="decode"}') == 0


def test_a_step_that_fails_is_counted_as_such() -> None:
    metrics = Metrics(LIMITS)
    metrics.engine.step(replace(engine_step(), num_prefill_tokens=0, has_failed=True))
    text = metrics.exposition()
    assert sample(text, 'tgi_batch_inference_failure{method="decode"}') == 1
    assert sample(text, 'tgi_batch_inference_success{method="decode"}') == 0


def test_replayed_steps_are_counted_by_what_they_compute() -> None:
    metrics = Metrics(LIMITS)
    for num_prefill_tokens, is_replayed in ((0, True), (0, True), (0, False), (3, True)):
        metrics.engine.step(
            StepOutput(
                num_scheduled_tokens=9,
                num_prefill_tokens=num_prefill_tokens,
                is_replayed=is_replayed,
            )
        )
    text = metrics.exposition()
    assert sample(text, 'tokenwire_replayed_steps_total{method="decode"}') == 2
    assert sample(text, 'tokenwire_replayed_steps_total{method="prefill"}') == 1


def test_counters_of_the_engine_go_on_when_a_new_one_starts_from_zero(metrics: Metrics) -> None:
    for num_preemptions in (7, 0, 2, 2):
        stats = EngineStats(num_preemptions=num_preemptions)
        metrics.engine.step(StepOutput(stats=stats, num_scheduled_tokens=1))
    assert sample(metrics.exposition(), "tokenwire_preemptions_total") == 9


def test_what_another_service_is_told_is_not_counted_here(metrics: Metrics) -> None:
    before = sample(metrics.exposition(), "tokenwire_preemptions_total")
    for num_preemptions in (13, 15):
        metrics.engine.step(StepOutput(stats=EngineStats(num_preemptions=num_preemptions)))
    metrics.engine.step(StepOutput(stats=EngineStats(num_preemptions=16), num_scheduled_tokens=1))
    assert sample(metrics.exposition(), "tokenwire_preemptions_total") == before + 1


def test_names_of_keys_beyond_a_bound_share_a_label() -> None:
    metrics = Metrics(LIMITS)
    for number in range(MAX_CALLERS + 50):
        metrics.calls.begun("/a")
        metrics.calls.ended("/a", "OK", 0.1, f"key-{number}")
    text = metrics.exposition()
    callers = set(re.findall(r'tokenwire_calls_total{caller="([^"]*)"', text.decode()))
    assert len(callers) == MAX_CALLERS + 2  # the empty name, and all others
    assert sample(text, 'tokenwire_calls_total{caller="key-1",code="OK"}') == 1
    assert sample(text, 'tokenwire_calls_total{caller="other",code="OK"}') == 50


async def test_recorded_traces_are_examples_of_what_was_observed() -> None:
    metrics = Metrics(LIMITS)
    call = begin_record(None, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    metrics.requests.finished(generation())
    tally = Tally(now=2.0)
    tally.add(Pace(1.5, 3, call=call), token())
    metrics.requests.step(tally)
    content_type, text = metrics.render(OPENMETRICS_TYPE)
    assert content_type == OPENMETRICS_TYPE
    for name, value in (
        ("tgi_request_duration", 1.5),
        ("tgi_request_generated_tokens", 2),
        ("tokenwire_time_to_first_token_seconds", 0.5),
    ):
        pattern = rf'^{name}_bucket{{le="\S+"}} 1.0 # {{trace_id="{TRACE}"}} {float(value)} \d+'
        assert re.search(pattern, text.decode(), re.MULTILINE), name


@pytest.mark.parametrize(
    "traceparent",
    [
        None,
        "",
        f"00-{TRACE}-b7ad6b7169203331-00",  # nobody records it
        f"ff-{TRACE}-b7ad6b7169203331-01",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{TRACE[:-1]}-b7ad6b7169203331-01",
        f"00-{TRACE.upper()}-b7ad6b7169203331-01",
    ],
)
async def test_other_traces_are_not_shown(traceparent: str | None) -> None:
    metrics = Metrics(LIMITS)
    begin_record(None, traceparent=traceparent)
    metrics.requests.finished(generation())
    assert b"trace_id" not in metrics.render(OPENMETRICS_TYPE)[1]
