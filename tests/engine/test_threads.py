"""The processors of the engine's threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine.kernels import cpu as cpu_kernels

_ALL = os.sched_getaffinity(0)


# In a process of its own: pinning lasts as long as a thread, and all tests share the thread pool.
_PINNED = """
import os, threading, torch
from engine import threads
every = os.sched_getaffinity(0)
torch.set_num_threads(len(every))
threads.pin({number})
def masks():
    return [sorted(os.sched_getaffinity(int(tid))) for tid in os.listdir("/proc/self/task")]
single = sorted(mask for mask in masks() if len(mask) == 1)
found = []
def run():
    threads.unpin()
    found.append(os.sched_getaffinity(0) == every)
thread = threading.Thread(target=run)
thread.start()
thread.join()
print(single == [[cpu] for cpu in sorted(every)], len(single), found)
"""


def _run(number: int) -> str:
    code = _PINNED.format(number=number)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(
    (kernels := cpu_kernels.load()) is None or not kernels.has_openmp or len(_ALL) < 2,
    reason="needs OpenMP and two processors",
)
def test_each_computing_thread_is_pinned_and_other_threads_are_not() -> None:
    assert _run(len(_ALL)) == f"True {len(_ALL)} [True]"


def test_fewer_threads_than_processors_are_not_pinned() -> None:
    assert _run(len(_ALL) + 1).endswith("0 [True]")
