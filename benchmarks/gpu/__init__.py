"""The first day on a GPU: one script per question, each of at most ten minutes and independent.

See docs/gpu.md for the commands, their order, and the figures that are awaited. Each script writes
one file into benchmarks/results/, after each of its parts, so that nothing is lost if it is killed.
With `--smoke --device cpu` each runs on tiny sizes without a GPU, and its file says so.

What must be decided before torch and Triton are imported is decided here: as in a server's process,
segments of torch's allocator may grow; and on a CPU Triton interprets its kernels.
"""

import os
import sys

from engine.cuda_segments import prefer_growing_segments

prefer_growing_segments()
if {"--device=cpu", "cpu"} & set(sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")
