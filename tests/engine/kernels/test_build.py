"""Compiling and loading the C kernels: the compiler, the cache, the OpenMP runtime, the switch."""

from __future__ import annotations

import ctypes
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from engine import server
from engine.kernels import build
from engine.kernels.cpu import CpuKernels
from engine.protocol.config import EngineConfig
from tests.engine.kernels.linear_checks import check_linear
from tests.engine.native import needs_compiler
from tests.paths import REPOSITORY


@needs_compiler
def test_kernels_share_torchs_openmp_runtime(kernels: CpuKernels) -> None:
    if build.find_openmp_runtime() is None:
        pytest.skip("torch brings no libgomp here")
    assert kernels.has_openmp
    mapped = {path for path in build._mapped_libraries() if path.name.startswith("libgomp")}
    assert len({path for path in mapped if path.parent.suffix != ".libs"}) == 1


def test_the_openmp_runtime_of_another_package_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be loaded before torch's, which has a pool of threads of its own."""
    other, own = (tmp_path / folder / "libgomp.so.1" for folder in ("sentencepiece.libs", "lib"))
    for path in (other, own):
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr(build, "_mapped_libraries", lambda: [other, own])
    monkeypatch.setattr(build, "_bundled_libraries", list)
    assert build.find_openmp_runtime() == own
    monkeypatch.setattr(build, "_bundled_libraries", lambda: [own])
    assert build.find_openmp_runtime() == own


@needs_compiler
def test_build_is_cached_in_a_private_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(build.build_library(["-O0"]), ctypes.CDLL)
    directory = tmp_path / "tokenwire"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [path.suffix for path in directory.iterdir()] == [".so"]
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    build.build_library(["-O0"])


@needs_compiler
def test_build_refuses_a_directory_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tokenwire").mkdir()
    (tmp_path / "tokenwire").chmod(0o777)
    with pytest.raises(build.BuildError, match="writable by other users"):
        build.build_library()


@needs_compiler
def test_build_without_a_home_is_kept_beside_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build.build_library(["-O0"])
    (directory,) = tmp_path.iterdir()
    assert directory.name == f"tokenwire.{os.getuid()}"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_no_place_for_the_build_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(build.BuildError, match=r"^no usable cache directory: [^\n]*$"):
        build.cache_directory()


def test_a_link_beside_temporary_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / f"tokenwire.{os.getuid()}").symlink_to(tmp_path / "real")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    with pytest.raises(build.BuildError, match="writable by other users"):
        build.cache_directory()


@needs_compiler
def test_build_that_began_while_torch_was_imported_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-std=gnu11", "-O0", "-fPIC"))
    began, compiled = threading.Event(), []
    compile_ = build._compile

    def slow(*arguments: Any) -> None:
        compiled.append(arguments)
        began.set()
        compile_(*arguments)

    monkeypatch.setattr(build, "_compile", slow)
    build.build_ahead()
    assert began.wait(60)
    build.build_library()
    assert len(compiled) == 1


@needs_compiler
def test_compiler_has_its_temporary_files_in_the_cache_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "/proc/nothing")
    killed = tmp_path / "tokenwire" / "build-killed"
    killed.mkdir(parents=True)
    killed.parent.chmod(0o700)
    os.utime(killed, (0, 0))
    assert CpuKernels(build.build_library(["-O0"])).has_openmp
    assert [path.suffix for path in killed.parent.iterdir()] == [".so"]


@needs_compiler
def test_build_without_a_shared_runtime_runs_on_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_openmp_runtime", lambda: None)
    with caplog.at_level(logging.WARNING):
        kernels = CpuKernels(build.build_library(["-O1"]))
    assert not kernels.has_openmp
    assert "one thread" in caplog.text
    check_linear(kernels, 5, 64, 70, True, 0)


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that takes no time, and an empty cache; returns the cache's directory."""
    source = tmp_path / "cpu.c"
    source.write_text('__attribute__((visibility("default"))) int answer(void) { return 42; }\n')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenwire"


@needs_compiler
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_library_that_lost_its_end_is_compiled_again(small_source: Path, share: float) -> None:
    """To load it would end the process."""
    path = build._built(["-O0"])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert build.build_library(["-O0"]).answer() == 42
    assert path.stat().st_size == len(whole)
    assert list(small_source.iterdir()) == [path]


@needs_compiler
def test_a_library_of_something_else_is_compiled_again(small_source: Path) -> None:
    path = build._built(["-O0"])
    path.write_bytes(Path(sys.executable).read_bytes())
    assert build.build_library(["-O0"]).answer() == 42


@needs_compiler
def test_a_full_cache_is_left_for_temporary_files(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, full = build.shutil.disk_usage, small_source.parent
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def disk_usage(path: Path) -> Any:
        return usage(path)._replace(free=0) if full in path.parents else usage(path)

    kept = build._built(["-O0"])
    monkeypatch.setattr(build.shutil, "disk_usage", disk_usage)
    assert build._built(["-O0"]) == kept
    assert build._built(["-O1"]).parent == tmp_path / f"tokenwire.{os.getuid()}"


def test_a_compiler_that_fails_is_not_asked_again(
    small_source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = small_source.parent.parent / "calls"
    compiler = calls.with_name("broken-cc")
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\necho called >>{calls}\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(build.BuildError, match="broken-cc failed"):
        build.build_library()
    before = calls.read_text()
    with pytest.raises(build.BuildError, match="broken-cc failed"):
        build.build_library()
    assert calls.read_text() == before
    assert "one thread" not in caplog.text


def test_a_compiler_with_an_open_quotation_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CC", 'gcc "-mno-avx512f')
    with pytest.raises(build.BuildError, match=r'^CC cannot be read: [^\n]*: gcc "-mno-avx512f$'):
        build.build_library()


@needs_compiler
def test_a_compiler_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "gxx -mno-avx512f")
    assert build.find_compiler() == build.find_compiler()
    assert caplog.text.count("CC is gxx, which is not there") == 1


def test_missing_compiler_gives_none_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    build.load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert build.load_library() is None
            assert build.load_library() is None
        assert caplog.text.count("no C compiler found") == 1
    finally:
        build.load_library.cache_clear()


def test_failing_compiler_gives_none_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho out of luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert build.load_library() is None
        assert "out of luck" in caplog.text
    finally:
        build.load_library.cache_clear()


def test_switch_turns_the_kernels_off() -> None:
    code = "from engine.kernels.cpu import load; print(load())"
    environment = {**os.environ, build.SWITCH: "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize("is_on", [False, True])
def test_an_engines_settings_outweigh_the_switch(
    is_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling and threads ask for the kernels without a configuration."""
    switches = []
    monkeypatch.setenv(build.SWITCH, str(int(not is_on)))
    monkeypatch.setattr(server, "Heartbeat", MagicMock())
    monkeypatch.setattr(server, "limit_arenas", lambda: None)
    monkeypatch.setattr(server, "build_ahead", lambda: None)
    monkeypatch.setattr(server, "_serve", lambda *_: switches.append(os.environ[build.SWITCH]))
    server.serve(
        EngineConfig(model_id="any", socket_path=tmp_path / "s", enable_native_kernels=is_on)
    )
    assert switches == [str(int(is_on))]
