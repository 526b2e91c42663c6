"""`tokenwire bench` against a real server, over both transports."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from service.launch.sources import without_settings
from tests.e2e.stack import DEADLINE_S, TOKENWIRE, Stack

SIZES = ("--requests=4", "--warm-up=2", "--input-tokens=40", "--output-tokens=6")
LATENCIES = ("first_token_ms", "inter_token_ms", "end_to_end_ms", "sent_late_ms")


def run_bench(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(TOKENWIRE), "bench", *flags],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=without_settings(os.environ),
    )


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON on the last line of a successful run."""
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("loop", ["--concurrency=2", "--rate=20"])
def test_every_request_and_token_is_counted(target: str, loop: str, stack: Stack) -> None:
    before = stack.metric("tgi_request_generated_tokens_sum")
    done = run_bench(f"--target={target}", loop, *SIZES, "--json")
    found = result(done)
    assert found["target"] == target
    assert found["transport"] == ("rest" if target.startswith("http") else "grpc")
    assert found["loop"] == ("open" if "rate" in loop else "closed")
    assert (found["succeeded"], found["failed"], found["failures"]) == (4, 0, [])
    assert (found["input_tokens"], found["generated_tokens"], found["ended_early"]) == (40, 24, 0)
    for name in LATENCIES:
        times = found[name]
        assert 0 <= times["p50"] <= times["p90"] <= times["p99"]
    assert found["first_token_ms"]["p50"] < found["end_to_end_ms"]["p50"]
    assert found["duration_s"] > 0
    assert found["mean_queue_ms"] >= 0
    assert found["output_tokens_per_s"] == pytest.approx(6 * found["requests_per_s"], rel=0.01)
    assert "first token" in done.stdout
    generated = stack.metric("tgi_request_generated_tokens_sum") - before
    assert 24 + 2 <= generated <= 24 + 2 * 6  # the two warm-up requests may have ended early


def test_prompts_hit_the_prefix_cache_only_with_a_shared_prefix(stack: Stack) -> None:
    series = 'tokenwire_prompt_tokens_total{source="cache"}'
    before = stack.metric(series)
    for _ in range(2):  # a second run with the same seed has other prompts
        result(run_bench(f"--target={stack.url}", *SIZES, "--json"))
    assert stack.metric(series) == before
    result(run_bench(f"--target={stack.url}", *SIZES, "--shared-prefix=32", "--json"))
    assert stack.metric(series) >= before + 4 * 16


def test_too_long_requests_are_an_error_of_one_line(target: str) -> None:
    done = run_bench(f"--target={target}", "--input-tokens=100", "--output-tokens=100000")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert "`inputs` tokens + `max_new_tokens` must be <=" in last


def test_wrong_target_is_an_error_of_one_line(stack: Stack) -> None:
    for target in (f"{stack.url}/nowhere", f"http://{stack.grpc_address}"):
        done = run_bench(f"--target={target}")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"tokenwire bench: cannot measure {target}: " in done.stderr.splitlines()[-1]
