"""`python -m tests.service.workers.silent_worker`: a process that never says that it is ready."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.stdin.buffer.read()  # until its parent ends
