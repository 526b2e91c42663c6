"""C kernels that were compiled beforehand, as images have them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.kernels import build, levels
from engine.kernels.cpu import CpuKernels
from engine.kernels.levels import LEVELS, usable_levels
from tests.engine.kernels.linear_checks import check_linear
from tests.engine.native import needs_compiler
from tests.paths import REPOSITORY

needs_a_level = pytest.mark.skipif(not usable_levels(), reason="for no other processors")


FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)  # a tenth of the time


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", FLAGS)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries for all levels, compiled."""
    directory = tmp_path_factory.mktemp("prebuilt")
    for level in LEVELS:
        build.prebuild(level, directory)
    return directory


@pytest.fixture
def prebuilt(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same on a machine that has no compiler, which finds them."""
    monkeypatch.setattr(build, "PREBUILT", directory)
    monkeypatch.setattr(build, "find_compiler", lambda: pytest.fail("looked for a compiler"))
    return directory


@needs_compiler
@needs_a_level
def test_every_level_of_this_processor_computes_the_same(prebuilt: Path) -> None:
    for level in usable_levels():
        (path,) = prebuilt.glob(f"cpu-{level.name}-*.so")
        kernels = CpuKernels(ctypes.CDLL(str(path)))
        assert kernels.has_openmp == (build.find_openmp_runtime() is not None)
        check_linear(kernels, 5, 64, 96, True, 0)


@needs_compiler
@needs_a_level
def test_the_best_level_of_the_processor_is_used(
    prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for usable in (list(LEVELS[first:]) for first in range(len(LEVELS))):
        monkeypatch.setattr(build, "usable_levels", lambda usable=usable: usable)
        found = build.find_prebuilt()
        assert found is not None
        assert found.name.startswith(f"cpu-{usable[0].name}-")
    monkeypatch.setattr(build, "usable_levels", list)
    assert build.find_prebuilt() is None


@needs_compiler
@needs_a_level
def test_a_compiler_with_options_is_preferred_and_half_a_library_is_not(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = directory.glob(f"cpu-{usable_levels()[0].name}-*.so")
    copy = Path(shutil.copy(whole, tmp_path))
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    assert build.find_prebuilt() == copy
    monkeypatch.setenv("CC", "cc -mno-avx512f")
    assert build.find_prebuilt() is None
    monkeypatch.setenv("CC", "absent -mno-avx512f")
    assert build.find_prebuilt() == copy
    copy.write_bytes(copy.read_bytes()[:-100])
    assert build.find_prebuilt() is None


@needs_compiler
@needs_a_level
def test_no_compiler_is_needed(prebuilt: Path) -> None:
    library = build.build_library()
    assert Path(library._name).parent == prebuilt


@needs_compiler
@pytest.mark.parametrize("name", ["cpu.c", "linear.h", "replay.h"])
def test_libraries_of_another_source_are_not_used(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = Path(shutil.copytree(build.SOURCE.parent, tmp_path / "c"))
    monkeypatch.setattr(build, "SOURCE", source / build.SOURCE.name)
    assert build.find_prebuilt() is not None
    (source / name).write_text((source / name).read_text() + "\n")
    assert build.find_prebuilt() is None


def test_a_level_is_usable_where_all_of_its_instructions_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pairs, best, second, third, last = LEVELS
    listed = {
        tuple(LEVELS): pairs.flags | third.flags,
        (pairs, best, second, last): pairs.flags,
        (best, second, third, last): best.flags | third.flags,
        (best, second, last): best.flags,
        (second, last): best.flags - {"avx512_vnni"},
        (third, last): third.flags | (second.flags - {"avx512vl"}),
        (last,): second.flags - {"avx512vl"},
        (): second.flags - {"fma"},
    }
    monkeypatch.setattr(levels, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for usable, flags in listed.items():
        text = f"processor\t: 0\nflags\t\t: fpu {' '.join(sorted(flags))}\n"
        (tmp_path / "cpuinfo").write_text(text)
        assert tuple(usable_levels()) == usable
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert usable_levels() == []


@needs_compiler
def test_the_images_command_says_what_it_has_made(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from engine.kernels import build, prebuild;"
        f"build.FLAGS = {FLAGS}; prebuild.PREBUILT = pathlib.Path(sys.argv[1]);"
        "sys.exit(prebuild.main(['avx2']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    (path,) = tmp_path.iterdir()
    assert done.stdout == f"{path}\n"
