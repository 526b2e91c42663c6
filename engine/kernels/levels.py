"""The levels of x86-64 processors for which the C kernels can be compiled beforehand.

Owns which instructions a level has, and which of them this machine's processor has. It does not
know how to compile.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Level:
    """A kind of processors.

    Attributes:
        name: a word for file names.
        options: of the compiler.
        flags: what Linux lists of such a processor in /proc/cpuinfo.
    """

    name: str
    options: tuple[str, ...]
    flags: frozenset[str]


# What the psABI's levels 3 and 4 add to the flags that all x86-64 processors have.
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# The best first.
LEVELS = (
    Level(
        "avx512bf16",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        _V4 | {"avx512_vnni", "avx512_bf16"},
    ),
    Level("avx512vnni", ("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"}),
    Level("avx512", ("-march=x86-64-v4",), _V4),
    Level("avxvnni", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
    Level("avx2", ("-march=x86-64-v3",), _V3),
)


def usable_levels() -> list[Level]:
    """Return the levels that this machine's processor has, the best first."""
    if platform.machine() != "x86_64":
        return []
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return [level for level in LEVELS if level.flags <= flags]
