"""Code of libraries is given back, and runs as before; what a debugger has changed stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.library_pages import _code, give_back_library_pages

MAPPINGS = """\
1000-2000 r-xp 00001000 08:01 42 /usr/lib/libfirst.so
Size:               4096 kB
Rss:                 600 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
2000-3000 r--p 00002000 08:01 42 /usr/lib/libfirst.so
Rss:                 600 kB
Anonymous:             0 kB
3000-4000 r-xp 00001000 08:01 43 /usr/lib/with a breakpoint.so
Rss:                 600 kB
Anonymous:             4 kB
4000-5000 r-xp 00001000 08:01 44 /usr/lib/libsmall.so
Rss:                 500 kB
Anonymous:             0 kB
5000-6000 r-xp 00000000 00:00 0 [vdso]
Rss:                 600 kB
Anonymous:             0 kB
6000-7000 r-xp 00000000 00:00 0
Rss:                 600 kB
Anonymous:             0 kB
7000-8000 rw-p 00000000 00:00 0 [heap]
Rss:                 600 kB
Anonymous:             0 kB
"""


def test_only_code_as_files_have_it_is_given_back() -> None:
    assert list(_code(MAPPINGS.splitlines())) == [(0x1000, 0x2000, 600 * 1024)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_goes_on_with_less_memory() -> None:
    program = """
import numpy
from pathlib import Path
from engine.library_pages import give_back_library_pages

def resident():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "RssFile" in x)
    return int(line.split()[1])

numpy.ones((8, 8)) @ numpy.ones((8, 8))
before = resident()
given = give_back_library_pages()
print(given // 1024, before - resident(), (numpy.ones((8, 8)) @ numpy.ones((8, 8)))[0, 0])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    given, less, result = ended.stdout.split()
    assert int(given) > 1024
    assert int(less) > 0
    assert float(result) == 8.0


def test_without_the_list_of_mappings_nothing_is_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("engine.library_pages._SMAPS", tmp_path / "missing")
    assert give_back_library_pages() == 0
