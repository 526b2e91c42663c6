"""Step 3: the whole of `benchmarks.engine_gpu`, with a result file that is written part by part.

Is the engine right at real shapes; how near is it to the ceilings of the device in decoding and
prefill; how long is the device idle between steps; what does speculation gain.

    python -m benchmarks.gpu.engine
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import engine_gpu
from benchmarks.engine_gpu import TINY, Bench, Sizes
from benchmarks.gpu.results import Results, arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the ceilings and the parts; the status is 1 if any fails."""
    assert __doc__ is not None
    found = arguments(__doc__, argv, only=list(engine_gpu.PARTS))
    results = Results("engine", found)
    dtype = torch.float32 if results.device.type == "cpu" else torch.bfloat16
    sizes = TINY if found.smoke else Sizes()
    bench = Bench(results.device, dtype, sizes, tiny=found.smoke)
    parts = {name: engine_gpu.PARTS[name] for name in found.only}
    every = {"ceilings": engine_gpu.ceilings, **parts}
    results.run(
        {name: partial(figures, results, bench, name, part) for name, part in every.items()}
    )
    for name, reason in bench.errors.items():
        results.fail(name, reason)
    return results.finish()


def figures(
    results: Results, bench: Bench, name: str, part: Callable[[Bench], None]
) -> dict[str, Any]:
    """Runs a part; returns the figures it has noted, and the attention it ran on.

    If it fails, the result has those of before.
    """
    before = len(bench.figures)

    def noted() -> dict[str, Any]:
        rows = [
            {**asdict(figure), "share": figure.value / figure.roof if figure.roof else None}
            for figure in bench.figures[before:]
        ]
        return {"attention": bench.attention, "figures": rows}

    try:
        part(bench)
    except Exception:
        results.note(name, noted())
        raise
    return noted()


if __name__ == "__main__":
    sys.exit(main())
