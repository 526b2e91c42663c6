"""Step 2: the engine's own tests, on a device: `pytest --device cuda`.

What tests of kernels, recorded steps and whole engines find on a GPU, by test; those that know no
device (grammars, scheduling, the C kernels) are left out, since they say nothing new there.

    python -m benchmarks.gpu.engine_tests

It needs pytest, pytest-timeout, pytest-asyncio and hypothesis beside what the engine needs.
"""

from __future__ import annotations

import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import finished
from benchmarks.gpu.results import Results, arguments

GROUPS = {
    "kernels": [
        "tests/engine/kernels/test_triton_attention.py",
        "tests/engine/kernels/test_triton_store.py",
        "tests/engine/kernels/test_triton_quantize.py",
    ],
    "sampling": ["tests/engine/sampling"],
    "replay": ["tests/engine/replay/test_cuda_graphs.py"],
    "layers": ["tests/engine/model/test_fused_layers.py"],
    "engine": ["tests/engine/test_on_device.py"],
}
_SMOKE = ["tests/engine/kernels/test_triton_store.py"]


def main(argv: list[str] | None = None) -> int:
    """Runs the groups of tests; the status is 1 if any test fails."""
    assert __doc__ is not None
    found = arguments(__doc__, argv, only=list(GROUPS))
    results = Results("engine_tests", found)
    groups = {"smoke": _SMOKE} if found.smoke else {name: GROUPS[name] for name in found.only}
    for name, paths in groups.items():
        if results.left_s < 0:
            results.fail(name, "not run: no time left")
            continue
        with results.part(name):
            outcome = tested(paths, results.device.type, results.left_s)
            results.note(name, outcome)
            for test, reason in outcome["failed"].items():
                results.fail(test, reason)
    return results.finish()


def tested(paths: list[str], device: str, limit_s: float) -> dict[str, Any]:
    """How many tests passed and were skipped, and why others failed.

    Raises:
        RuntimeError: pytest did not get as far as to run tests.
        TimeoutError: they take longer than that; the message ends with the test that ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-v", f"--device={device}", *paths]
        command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
        ended = finished(command, limit_s)
        print(ended.stdout[-2000:])
        if ended.returncode not in (0, 1) or not report.exists():
            raise RuntimeError((ended.stderr or ended.stdout).strip()[-1000:])
        return _counted(ET.parse(report).getroot())


def _counted(report: ET.Element) -> dict[str, Any]:
    failed: dict[str, str] = {}
    num_skipped = num_passed = 0
    for case in report.iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if problem is not None:
            name = f"{case.get('classname')}::{case.get('name')}"
            failed[name] = f"{problem.get('message') or ''}\n{problem.text or ''}"[:2000]
        elif case.find("skipped") is not None:
            num_skipped += 1
        else:
            num_passed += 1
    return {"passed": num_passed, "skipped": num_skipped, "failed": failed}


if __name__ == "__main__":
    sys.exit(main())
