"""Every benchmark script runs, on models so small that it takes seconds.

Those that take longest, since they start servers or build many engines, are run on demand only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from tests.gguf_models import write_gguf
from tests.paths import REPOSITORY

ENGINE_GPU = {
    "memory copied",
    "matrix products",
    "8B: log-probabilities off by at most",
    "8B, decode, 1 row",
    "8B, decode, 4 rows",
    "8B, prefill, 2 x 48, computed",
    "8B, 4 rows, a step",
    "0.6B, decode, 1 row",
    "transformers continuous batching, the same",
    "3 draft tokens",
}

WITHOUT_PEERS = ("--without", "llama.cpp", "OpenVINO", "vLLM", "CTranslate2")
ABSENT = {"llama.cpp server", "OpenVINO GenAI", "vLLM", "CTranslate2", "CTranslate2, int8"}

on_demand = pytest.mark.skipif(not os.environ.get("ALL_SCRIPTS"), reason="`make scripts` runs it")


def last_line(*arguments: str) -> Any:
    """Runs a script with `--tiny`; returns the JSON of its last line."""
    command = [sys.executable, "-m", *arguments, "--tiny"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_engine_gpu_measures_all_its_parts_without_a_gpu() -> None:
    result = last_line("benchmarks.engine_gpu", "--device", "cpu")
    assert result["errors"] == {}
    assert ENGINE_GPU - {figure["name"] for figure in result["figures"]} == set()


def test_engine_cpu_measures_every_target() -> None:
    result = last_line("benchmarks.engine_cpu", "--repeat", "1")
    assert set(result["decode_s"]) == {"1", "8", "32"}
    assert len(result["inter_token_ms"]) == 3
    assert all(target["value"] is not None for target in result["targets"])


@on_demand
def test_peers_generate_the_same_tokens() -> None:
    result = last_line("benchmarks.peers", "--repeat=1", "--counts", "1", "2", *WITHOUT_PEERS)
    assert set(result["absent"]) == ABSENT
    assert set(result["agreement"].values()) == {32}
    rates = result["tokens_per_second"]
    assert len(rates) == 6
    assert all(set(found) == {"1", "2"} for found in rates.values())
    waits = result["ms_between_tokens"]
    assert set(waits) == {name for name in rates if not name.startswith("transformers")}
    assert all(0 < p50 <= p99 for found in waits.values() for p50, p99 in found.values())


@on_demand
def test_peers_run_a_file_of_quantised_weights(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", GGMLQuantizationType.Q4_1)
    result = last_line(
        *("benchmarks.peers", "--repeat=1", "--counts", "1", "2", f"--gguf={path}"),
        *WITHOUT_PEERS,
    )
    assert set(result["absent"]) == ABSENT | {"server"}
    assert result["agreement"] == {"engine alone": 32}
    assert set(result["tokens_per_second"]) == {
        "transformers generate",
        "transformers continuous batching",
        "engine alone",
        "engine alone, int8",
    }


@on_demand
def test_metrics_measures_steps_and_scrapes() -> None:
    result = last_line("benchmarks.metrics", "--streams", "1", "4")
    assert set(result["steps"]) == {"1", "4"}
    assert all(row["metrics_us"] > 0 for row in result["steps"].values())
    assert len(result["scrape_ms"]) == 2


@on_demand
def test_grammar_backends_measures_both_libraries() -> None:
    result = last_line("benchmarks.grammar_backends")
    libraries = {"llguidance", "outlines"}
    assert {library for table in result["tables"] for library in table["seconds"]} == libraries
    assert {figure["library"] for figure in result["figures"]} == libraries
    assert all(figure["first_mask_ms"] > 0 for figure in result["figures"])
    assert all(figure["token_us"] > 0 for figure in result["figures"])


def test_speculation_changes_no_token() -> None:
    rows = last_line("benchmarks.speculation", "--rounds", "1")
    assert [row["text"] for row in rows] == ["repetitive"] * 2 + ["random"] * 2


@on_demand
def test_long_contexts_are_measured_for_every_batch_and_prompt() -> None:
    result = last_line("benchmarks.long_contexts")
    assert [(row["batch"], row["context"]) for row in result["decode"]] == [
        *((1, 16), (1, 64)),
        *((8, 16), (8, 64)),
    ]
    assert [row["num_tokens"] for row in result["lookup"]] == [64]


@on_demand
@pytest.mark.parametrize("mixture", [False, True])
def test_quantised_weights_are_measured_at_every_batch(mixture: bool) -> None:
    options = ["--mixture"] if mixture else []
    result = last_line("benchmarks.quantized", "--rounds", "1", *options)
    rates = result["tokens_per_second"]
    left = {"float32, experts by torch"} if mixture else set()
    assert set(rates) == {"float32", "bfloat16", "int8", "int4"} | left
    assert set(result["first_s"]) == set(rates)
    assert all(set(found) == {"1", "8", "32"} for found in rates.values())


@on_demand
def test_formats_are_measured_without_peers() -> None:
    result = last_line("benchmarks.formats", "--repeat=1", "--without", "OpenVINO", "llama.cpp")
    assert set(result["formats"]) == {"float32", "16-bit", "int8", "int4"}
    for name, found in result["formats"].items():
        also = {"ours, --dtype bfloat16"} if name == "16-bit" else set()
        assert set(found["tokens_per_second"]) == set(found["first_s"]) == {"ours"} | also
        assert set(found["tokens_per_second"]["ours"]) == {"1", "8", "32"}


@on_demand
def test_every_kind_of_sampling_is_measured() -> None:
    figures = last_line("benchmarks.sampling", "--repeat", "1")["figures"]
    assert len(figures) == 2 * len({figure["kind"] for figure in figures}) == 18
    assert all(figure["ours_ms"] > 0 for figure in figures)
    alone = {figure["kind"] for figure in figures if figure["transformers_ms"] is None}
    assert alone == {"frequency_penalty 0.5"}


@on_demand
def test_resumed_streams_are_counted_in_every_arm() -> None:
    outcomes = last_line("benchmarks.resumption")["outcomes"]
    assert len(outcomes) == 5
    assert all(outcome["streams"] == 4 for outcome in outcomes)
    assert all(outcome["resumptions"] > 0 for outcome in outcomes)
    exact = [outcome for outcome in outcomes if "without our kernels" not in outcome["name"]]
    assert all(outcome["left"] == outcome["rounded"] == 0 for outcome in exact)


@on_demand
def test_servers_with_and_without_traces_take_turns() -> None:
    result = last_line("benchmarks.tracing")
    assert set(result["tokens_per_second"]) == {"gRPC", "REST"}
    assert all(
        set(found) == {"with traces", "without traces"}
        for found in result["tokens_per_second"].values()
    )
    assert result["exported_bytes"] > 0


@on_demand
def test_loop_measures_what_stands_in_the_way_of_streams() -> None:
    (row,) = last_line("benchmarks.loop")["rows"]
    assert row["seconds"] > 0


@on_demand
def test_what_a_service_process_carries_is_measured_over_every_face() -> None:
    figures = last_line("benchmarks.workers")["figures"]
    faces = [figure["face"] for figure in figures]
    assert faces == ["gRPC", "gRPC through Envoy", "REST", "bare grpc.aio"]
    assert all(figure["arrived"] > 0 for figure in figures)


@on_demand
def test_a_server_of_replicas_is_measured_over_both_faces() -> None:
    points = last_line("benchmarks.scale")["points"]
    assert [point["face"] for point in points] == ["rest", "grpc"]
    for point in points:
        assert point["calls"] == 6
        assert point["tokens"] == 24
        assert point["cpu_s"]["engine"] > 0
        assert not point["summary"]["failures"]


@on_demand
def test_several_engines_without_a_model_are_measured_as_one_server() -> None:
    arguments = ("--echo", "0.02", "--replicas", "2", "--workers", "2")
    points = last_line("benchmarks.scale", *arguments)["points"]
    assert [(point["replicas"], point["workers"]) for point in points] == [(2, 2), (2, 2)]
    assert [point["calls"] for point in points] == [6, 6]


@on_demand
def test_costs_of_steps_are_fitted() -> None:
    found = last_line("benchmarks.simulation.calibrate")
    assert found["step"]["seconds"]["per_prompt_token_s"] > 0
    assert found["machine"]["cores"] > 0


@on_demand
def test_a_greedy_caller_does_not_keep_another_out() -> None:
    result = last_line("benchmarks.fairness")
    assert result["alone_ms"]
    assert result["beside_ms"]
    assert result["greedy"]["200"] > 0


def test_a_server_under_everything_at_once_gives_right_answers_and_keeps_nothing() -> None:
    """Half a minute, in which its processes are killed one after the other."""
    result = last_line("benchmarks.soak")
    unexpected = {
        kind: tally["why"]
        for kind, tally in result["tallies"].items()
        if tally["wrong"] or tally["lost"]
    }
    assert unexpected == {}
    assert len(result["tallies"]) == 9
    assert sum(tally["right"] for tally in result["tallies"].values()) > 0
    assert "engine" in result["recovery_s"]
    assert result["blocks"] == 0


@on_demand
def test_adapters_measures_every_target() -> None:
    result = last_line("benchmarks.adapters", "--repeat=1")
    assert len(result["targets"]) == 6
    assert all(target["value"] > 0 for target in result["targets"])


@on_demand
def test_engines_are_chosen_in_both_ways() -> None:
    result = last_line("benchmarks.replicas")
    assert [figure["way"] for figure in result["figures"]] == ["least busy", "beginning"]
    assert all(figure["hit_rate"] > 0 for figure in result["figures"])
    assert all(len(figure["first_ms"]) == 8 for figure in result["figures"])


@on_demand
def test_servers_are_chosen_in_both_ways() -> None:
    result = last_line("benchmarks.servers")
    assert [figure["way"] for figure in result["figures"]] == ["fewest requests", "beginning"]
    assert all(figure["hit_rate"] > 0 for figure in result["figures"])
    assert all(len(figure["first_ms"]) == 8 for figure in result["figures"])


@on_demand
def test_what_every_process_holds_is_seen_before_and_after_a_load() -> None:
    result = last_line("benchmarks.memory")
    assert result["before"].keys() == result["after"].keys()
    assert {"engine", "service", "envoy", "supervisor"} <= result["before"].keys()
    assert result["before"]["engine"]["rss"] > result["weights"] + result["cache"] > 0


@on_demand
def test_a_server_is_watched_while_it_is_asked_all_kinds_of_things() -> None:
    result = last_line("benchmarks.growth")
    assert len(result["samples"]) > 2
    assert sum(result["asked"].values()) > 0
    assert result["blocks"] == 0
