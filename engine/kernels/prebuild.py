"""`python -m engine.kernels.prebuild`: compiles the C kernels for machines without a compiler.

One library per level of processors is written beside this file, where `build.py` finds them. They
are linked against the OpenMP runtime of the torch that is installed here: a server that uses them
must have the same one.
"""

import sys

from .build import PREBUILT, prebuild
from .levels import LEVELS


def main(names: list[str]) -> int:
    """Compile for all levels, or for those that are named; return the exit code."""
    for level in LEVELS:
        if not names or level.name in names:
            sys.stdout.write(f"{prebuild(level, PREBUILT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
