"""All Triton kernels compile for GPUs, within the shared memory that these have.

`ALL_GPUS=1` compiles them for all cases, each of which takes several seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

pytest.importorskip("triton")


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = ["-m", "tests.engine.kernels.compile_for_gpu"]
    command += ["80:bfloat16:bfloat16:576"]
    gpus = [("80", 99)]
    if os.environ.get("ALL_GPUS"):
        command += ["80:bfloat16:bfloat16:128", "80:bfloat16:float8_e5m2:256"]
        command += ["90:float32:float32:256", "90:bfloat16:bfloat16:576"]
        command += ["90:bfloat16:float8_e4m3fn:128"]
        gpus.append(("90", 227))
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    names = {"attend_splits", "attend_tiles", "merge_splits", "rotary_write_kv", "write_kv"}
    names |= {
        "round_row",
        "scale_row",
        "gate_rows",
        "norm_rows",
        "slice_peaks",
        "choose_rows",
        "truncate_rows",
        "shrink_rows",
        "expand_rows",
    }
    # KiB of shared memory per program. Kernels for 8.0 also run on 8.6 and 8.9, which have less.
    for gpu, limit in gpus:
        lines = [line.split() for line in ended.stdout.splitlines() if f" {gpu} " in line]
        assert {name for name, _, _ in lines} == names
        assert max(int(size) for _, _, size in lines) <= limit * 1024


LATE = """
import logging, torch
from engine.kernels import triton_elementwise
from engine.kernels.late_compilation import warn_of_compilations
from tests.engine.kernels.compile_for_gpu import compile_for

logging.basicConfig()
compile_for(80)
merged = torch.zeros(2, 64)
triton_elementwise.gated(merged, activation="silu")
warn_of_compilations()
triton_elementwise.gated(merged, activation="silu")
triton_elementwise.gated(merged, activation="gelu_tanh")
"""


def test_a_kernel_that_the_start_up_missed_is_told(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", LATE],
        cwd=REPOSITORY,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "compiled while" in line]
    assert "gate_rows" in line
