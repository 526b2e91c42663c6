"""A model divided between two processes: same texts, and an engine that comes back as a whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.e2e.stack import ENDLESS, Stack, run_to_end, running, wait_until
from tests.e2e.test_healing import Streams, body, ended, is_gone
from tests.engine.adapters.made import make_adapter
from tests.paths import DEMO_MODEL

NUM_TOKENS = 400  # so many that they are not all there when a rank is lost
BODIES = [body(NUM_TOKENS), body(**ENDLESS | {"max_new_tokens": NUM_TOKENS})]  # greedy, sampled


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two ranks; the supervisor leaves frozen processes alone for longer than a test takes."""
    path = tmp_path_factory.mktemp("sharded")
    settings = {"r": 4, "lora_alpha": 1, "target_modules": "all-linear"}
    adapter = make_adapter(DEMO_MODEL, path / "poet", 1, **settings)
    flags = ("--num-shard=2", "--engine-stall-seconds=900", f"--lora-adapters=poet={adapter}")
    with running(path / "log", *flags) as stack:
        yield stack


@pytest.fixture(scope="module")
def unbroken(sharded: Stack) -> list[tuple[str, str, int]]:
    """The answers while no rank is lost."""
    return [ended(sharded.http.post("/generate", json=request).json()) for request in BODIES]


def _other_rank(stack: Stack) -> psutil.Process:
    """The process that computes the second rank's part."""
    children = stack.child("engine").children()
    (process,) = (child for child in children if "spawn_main" in " ".join(child.cmdline()))
    return process


def test_two_ranks_give_the_text_of_one(sharded: Stack, stack: Stack) -> None:
    answers = [
        server.generate("What is the capital of France?", max_new_tokens=20)
        for server in (sharded, stack)
    ]
    assert ended(answers[0]) == ended(answers[1])
    assert "rank 0 of 2" in sharded.log()


def test_adapters_are_served(sharded: Stack) -> None:
    texts = [
        sharded.generate("Where is Oslo?", max_new_tokens=12, adapter_id=name)["generated_text"]
        for name in (None, "poet")
    ]
    assert texts[0] != texts[1]


def test_the_memory_of_each_rank_is_shown(sharded: Stack) -> None:
    ranks = sharded.http.get("/info").json()["ranks"]
    assert len(ranks) == 2
    for number, rank in enumerate(ranks):
        weights = sharded.metric(f'tokenwire_weights_bytes{{rank="{number}"}}')
        cache = sharded.metric(f'tokenwire_kv_cache_bytes{{rank="{number}"}}')
        assert (weights, cache) == (rank["weights_bytes"], rank["cache_bytes"])
        assert min(weights, cache) > 0


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "rank 1 has ended"),
        (signal.SIGSTOP, "rank 1 gives no sign of life"),
    ],
)
def test_a_rank_that_is_lost_ends_the_engine_and_streams_go_on(
    sharded: Stack, unbroken: list[tuple[str, str, int]], number: signal.Signals, reason: str
) -> None:
    streams = Streams(sharded, BODIES)
    engine, other = sharded.child("engine"), _other_rank(sharded)
    with sharded.losing_engine():
        other.send_signal(number)
        wait_until(lambda: is_gone(engine) and is_gone(other), "the end of both ranks")
        assert [ended(event) for event in streams.last_events()] == unbroken
    line = f"the engine ends with all its ranks: {reason}"
    wait_until(lambda: line in sharded.log(), "a line about it")
    sharded.wait_until_idle()


def test_no_rank_outlives_the_engine(sharded: Stack) -> None:
    engine, other = sharded.child("engine"), _other_rank(sharded)
    with sharded.losing_engine():
        engine.kill()
        wait_until(lambda: is_gone(other), "the end of the other rank")


def test_a_model_that_cannot_be_divided_is_refused_in_one_line() -> None:
    ended_server = run_to_end("--num-shard=3")
    assert ended_server.returncode != 0
    last = ended_server.stderr.splitlines()[-1]
    assert "its 4 heads of model.layers.0.self_attn.q_proj cannot be divided among 3 ranks" in last
    assert last.endswith("; it can be divided by --num-shard 2 or 4")
