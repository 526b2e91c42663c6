"""The scripts of the first day on a GPU run without one, and do not pretend to have measured it."""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ET
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import engine_gpu, local_server
from benchmarks.gpu import (
    child,
    engine,
    engine_tests,
    kernels,
    peers,
    results,
    serving,
    sweeps,
)
from benchmarks.gpu.results import Results
from tests.engine.native import threads

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure"),
    pytest.mark.filterwarnings("ignore"),  # of Triton's interpreter and of NumPy in it
]

Script = Callable[[list[str]], int]


def smoke(script: Script, folder: Path, *words: str) -> dict[str, Any]:
    """Runs a script on tiny sizes; returns what is in its file."""
    with threads(1):
        status = script(["--smoke", "--device=cpu", f"--results={folder}", *words])
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert "cpu-smoke" in path.name
    assert found["measured_on"] == "cpu smoke"
    assert found["is_smoke"] is True
    assert found["gpu"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert status == bool(found["errors"])
    return found


def test_every_kernel_is_compared_with_torch(tmp_path: Path) -> None:
    found = smoke(kernels.main, tmp_path)
    assert found["errors"] == {}
    checks = [check for part in found["parts"].values() for check in part]
    assert {check["model"] for check in checks} == {"gpt-oss-20b"}  # has windows and sinks
    names = {check["kernel"].split(",")[0].split(":")[0] for check in checks}
    assert names == {
        *("attention", "write_kv", "rotary_write_kv", "rms_norm", "add_rms_norm", "gated"),
        *("choose", "truncate", "quantize_rows", "scale_sums", "low rank"),
    }
    assert all(check["difference"] <= check["tolerance"] for check in checks)


def test_a_script_by_itself_interprets_kernels_and_has_the_allocator_of_a_server(
    tmp_path: Path,
) -> None:
    names = ("TRITON_INTERPRET", "PYTORCH_ALLOC_CONF")
    bare = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--smoke", "--device=cpu"]
    ended = child.finished([*command, f"--results={tmp_path}", "--only", "quantize"], 200.0, bare)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert written["errors"] == {}
    assert written["allocator"] == "expandable_segments:True"


def test_a_command_that_takes_too_long_is_ended_with_what_it_has_started() -> None:
    """Its own child holds the pipe: only when that has ended is everything read."""
    with pytest.raises(TimeoutError, match="not done after 1 s: it began"):
        child.finished(["sh", "-c", "echo it began; sleep 900 & wait"], 1.0)


def test_a_wrong_kernel_is_an_error_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.kernels import triton_elementwise

    monkeypatch.setattr(triton_elementwise, "gated", lambda merged, **_: merged.chunk(2, -1)[0])
    found = smoke(kernels.main, tmp_path, "--only", "layers")
    assert found["errors"]
    assert all(": gated, " in name for name in found["errors"])
    assert any("rms_norm" in check["kernel"] for part in found["parts"].values() for check in part)


def test_the_engine_is_compared_and_measured(tmp_path: Path) -> None:
    found = smoke(engine.main, tmp_path, "--only", "correct_small", "small")
    assert found["errors"] == {}
    assert {"ceilings", "correct_small", "small"} == set(found["parts"])
    (decode, *_) = found["parts"]["small"]["figures"]
    assert decode["share"] == decode["value"] / decode["roof"]


def test_figures_from_before_a_failure_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(bench: engine_gpu.Bench) -> None:
        bench.note(engine_gpu.Figure("8B, decode, 1 row", 5.0, "tokens/s", 10.0))
        raise RuntimeError("no room for 64 rows")

    monkeypatch.setitem(engine_gpu.PARTS, "large", breaks)
    found = smoke(engine.main, tmp_path, "--only", "large")
    assert found["errors"] == {"large": "RuntimeError: no room for 64 rows"}
    (figure,) = found["parts"]["large"]["figures"]
    assert (figure["name"], figure["share"]) == ("8B, decode, 1 row", 0.5)


def test_sweeps_compare_every_size_with_the_one_in_force(tmp_path: Path) -> None:
    parts = ("attention_peers", "attention_sizes", "products", "layer_sizes", "residual_norms")
    parts += ("adapter_sizes",)
    found = smoke(sweeps.main, tmp_path, "--only", *parts, "sampling_sizes")
    assert found["errors"] == {}
    rows = found["parts"]["attention_sizes"]
    assert {row["size"] for row in rows} == set(sweeps.ATTENTION_SIZES)
    assert all(row["us"] > 0 for row in rows)
    arms = {row["arm"]: row for row in found["parts"]["attention_peers"]}
    assert arms["dense"]["difference"] < 1e-4
    assert "error" in arms["varlen"], "torch has no kernel for it on a CPU, and says so"


def test_the_server_streams_over_grpc(tmp_path: Path) -> None:
    found = smoke(serving.main, tmp_path)
    assert found["errors"] == {}
    assert found["parts"]["start_to_first_token_s"] > 0
    row = found["parts"]["4 streams"]
    assert row["tokens_per_s"] > 0
    assert set(row["processor_us_per_token"]) == {"engine", "service", "envoy"}


async def test_a_server_that_does_not_start_says_why() -> None:
    command = [sys.executable, "-c", "import sys; print('no GPU'); sys.exit('no GPU at all')"]
    url = f"http://127.0.0.1:{local_server.free_port()}"
    with pytest.raises(RuntimeError, match="the server did not start: no GPU at all"):
        async with local_server.process(command, url):
            pytest.fail("it is not ready")


def test_peers_that_are_not_installed_are_absent(tmp_path: Path) -> None:
    found = smoke(peers.main, tmp_path, "--only", "ours", "vllm")
    assert found["errors"] == {}
    assert found["parts"]["vllm"] == {"absent": "vllm is not installed"}
    assert set(found["parts"]["ours"]) == {"1", "2"}


def test_a_static_cache_decodes_one_stream(tmp_path: Path) -> None:
    task = peers.Task(tmp_path, torch.device("cpu"), is_smoke=True, counts=(1, 2))
    assert set(peers.static_cache(task)) == {"1"}


def test_the_engines_tests_are_counted_by_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "test_it_is_what_is_asked_for_or_what_there_is"
    monkeypatch.setattr(engine_tests, "_SMOKE", [f"tests/test_device.py::{name}"])
    found = smoke(engine_tests.main, tmp_path)
    assert found["errors"] == {}
    assert found["parts"]["smoke"] == {"passed": 10, "skipped": 0, "failed": {}}


def test_a_test_that_fails_is_named_with_its_reason() -> None:
    report = ET.fromstring(
        "<testsuites><testsuite>"
        "<testcase classname='a' name='passes'/>"
        "<testcase classname='a' name='is left out'><skipped/></testcase>"
        "<testcase classname='a' name='fails'><failure message='1 != 2'>line 3</failure></testcase>"
        "<testcase classname='a' name='breaks'><error message='no device'/></testcase>"
        "</testsuite></testsuites>"
    )
    found = engine_tests._counted(report)
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert found["failed"] == {"a::fails": "1 != 2\nline 3", "a::breaks": "no device\n"}


@pytest.mark.parametrize("words", [["--device=cpu"], [], ["--smoke"]])
def test_without_a_gpu_nothing_is_measured(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        results.arguments("Measures.", words)
    assert "--smoke" in capsys.readouterr().err


def test_kernels_that_would_be_interpreted_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        results.arguments("Measures.", [])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_part_that_fails_or_comes_too_late_leaves_the_others(tmp_path: Path) -> None:
    found = Results("x", Namespace(device="cpu", smoke=True, limit_s=1000.0, results=tmp_path))

    def late() -> int:
        found._limit_s = -1.0
        return 7

    def breaks() -> None:
        raise ValueError("it does not compile")

    found.run({"breaks": breaks, "works": lambda: 5, "late": late, "last": breaks})
    assert found.finish() == 1
    written = json.loads(found.path.read_text())
    assert written["parts"] == {"works": 5, "late": 7}
    assert written["errors"] == {
        "breaks": "ValueError: it does not compile",
        "last": "not run: no time left",
    }
    assert written["command"] == " ".join(sys.argv)
