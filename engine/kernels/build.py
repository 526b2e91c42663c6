"""Compiles the C kernels at first use and loads them, or loads those that were compiled beforehand.

Owns the compiler call, the per-user cache of built libraries and the choice of OpenMP runtime.
It does not know what the functions do; their signatures are in `cpu_*.py`.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .levels import Level, usable_levels

SOURCE = Path(__file__).with_name("c") / "cpu.c"  # includes the files beside it
PREBUILT = Path(__file__).with_name("prebuilt")  # libraries that `prebuild.py` has made
SWITCH = "TOKENWIRE_NATIVE_KERNELS"
COMPILE_TIMEOUT_S = 300
# No -ffast-math, with which infinities and NaN lose their meaning: they mark invalid rows. No
# contraction of products and sums: compilers contract some copies of a loop and not others, and a
# row's last bits would depend on how many rows are computed with it.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fPIC",
)
NATIVE = ("-march=native",)  # for this machine alone
_ROOM_BYTES = 32 << 20  # that a compiler's files may take
_SEAL_BYTES = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)

_UNFINISHED = "build-"  # begins the names of directories with builds that go on
_building = threading.Lock()


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the message says why."""


_failures: dict[Path, BuildError] = {}  # of this process: a compiler is not asked twice


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None with the reason logged once."""
    if os.environ.get(SWITCH, "1") == "0":
        logger.warning("native CPU kernels are off (%s=0); using torch", SWITCH)
        return None
    try:
        return build_library()
    except (BuildError, OSError) as error:
        logger.warning("native CPU kernels are not available, using torch: %s", error)
        return None


def build_ahead() -> None:
    """Start to compile in a thread, while this process imports torch; a failure is met again."""

    def build() -> None:
        with suppress(BuildError, OSError):
            _built()

    if os.environ.get(SWITCH, "1") != "0":
        threading.Thread(target=build, name="kernel build", daemon=True).start()


def build_library(extra_flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile unless an identical build is there already, then load.

    Raises:
        BuildError: there is no compiler, or it fails.
        OSError: the library cannot be loaded.
    """
    return ctypes.CDLL(str(_built(extra_flags)))


def prebuild(level: Level, directory: Path) -> Path:
    """Compile for all processors of a level; return the library's path.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    path = directory / _prebuilt_name(level)
    directory.mkdir(exist_ok=True)
    _compile(find_compiler(), [*FLAGS, *level.options], find_openmp_runtime(), path)
    return path


def find_prebuilt() -> Path | None:
    """Return the best library for this processor that was compiled beforehand of this source.

    None where $CC has options: they ask for another one.
    """
    wanted = _wanted_compiler()
    if len(wanted) > 1 and shutil.which(wanted[0]):
        return None
    paths = (PREBUILT / _prebuilt_name(level) for level in usable_levels())
    return next(filter(_is_whole, paths), None)


def _prebuilt_name(level: Level) -> str:
    """A file's name, which is another one when the source is."""
    source = "\0".join([*_source(), *FLAGS, *level.options])
    return f"cpu-{level.name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"


def _source() -> list[str]:
    """The text of all that is compiled."""
    return [path.read_text() for path in sorted(SOURCE.parent.glob("*.[ch]"))]


def _built(extra_flags: Sequence[str] = ()) -> Path:
    """The library's path; it is compiled by one thread while others wait.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    if not extra_flags and (prebuilt := find_prebuilt()) is not None:
        return prebuilt
    compiler = find_compiler()
    flags = [*FLAGS, *NATIVE, *extra_flags]
    with _building:
        runtime = find_openmp_runtime()
        path = cache_directory() / f"cpu-{_cache_key(compiler, flags, runtime)}.so"
        if _is_whole(path):
            return path
        path = _with_room(path)
        if path in _failures:
            raise _failures[path]
        try:
            if not _is_whole(path):
                _compile(compiler, flags, runtime, path)
        except BuildError as error:
            _failures[path] = error
            raise
    return path


def _with_room(path: Path) -> Path:
    """Where a library is built: there, or else where there is room for what its compiler writes."""
    if shutil.disk_usage(path.parent).free >= _ROOM_BYTES:
        return path
    return _temporary_directory() / path.name


def _is_whole(path: Path) -> bool:
    """Whether a library is there with all that was written: half a one ends a process (SIGBUS).

    Files may lose their end, or all of their content, when a machine loses its power.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_SEAL_BYTES]).digest() == content[-_SEAL_BYTES:]


def _seal(path: Path) -> None:
    """Put the digest of a library behind its end, where loaders do not look."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)


def find_compiler() -> list[str]:
    """Return the C compiler command: $CC, else cc, gcc or clang.

    It may have options: `CC="gcc -mno-avx512f"` compiles for AVX2 where there is AVX-512.

    Raises:
        BuildError: there is none of them, or $CC cannot be read.
    """
    wanted = _wanted_compiler()
    if wanted and shutil.which(wanted[0]):
        return wanted
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            if wanted:
                _warn_of_absent(wanted[0], found)
            return [found]
    raise BuildError("no C compiler found (set CC, or install gcc)")


def _wanted_compiler() -> list[str]:
    """What $CC says, in words; none if it says nothing.

    Raises:
        BuildError: a quotation has no end.
    """
    command = os.environ.get("CC", "")
    try:
        return shlex.split(command)
    except ValueError as error:
        raise BuildError(f"CC cannot be read: {error}. Given: {command}") from error


@functools.cache
def _warn_of_absent(wanted: str, found: str) -> None:
    logger.warning("CC is %s, which is not there: the kernels are compiled by %s", wanted, found)


def find_openmp_runtime() -> Path | None:
    """Return the libgomp that torch uses, so that both share one pool of threads.

    It comes with torch, or is the system's. Other packages bring their own in `….libs`, which may
    be loaded as well, for instance sentencepiece's.
    """
    others = [path for path in _mapped_libraries() if path.parent.suffix != ".libs"]
    for path in (*_bundled_libraries(), *others):
        if path.name.startswith("libgomp") and path.exists():
            return path
    return None


def cache_directory() -> Path:
    """Return the per-user build cache, created private to the user.

    It is in the user's home, or where that cannot be written, beside other temporary files.

    Raises:
        BuildError: there is no directory that only the user can write to.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return _private((Path(base).expanduser() / "tokenwire").resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        logger.debug("kernels are kept beside temporary files: %s", error)
    return _temporary_directory()


def _temporary_directory() -> Path:
    """Return the one beside other temporary files.

    Raises:
        BuildError: only the user must be able to write to it, and that is not so.
    """
    try:
        return _private(Path(tempfile.gettempdir()) / f"tokenwire.{os.getuid()}")
    except OSError as error:
        raise BuildError(f"no usable cache directory: {error}") from error


def _private(path: Path) -> Path:
    """Make a directory in which only the user can write.

    Raises:
        OSError: it cannot be made, or not written.
        BuildError: other users may write there.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = path.lstat()  # not of what a link points to, which its owner can change at any time
    # Its files are loaded as code: refuse a directory that other users own or may write to.
    if not path.is_dir() or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise BuildError(f"cache directory {path} is writable by other users")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is read-only")
    return path


def _mapped_libraries() -> list[Path]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = (line.split(maxsplit=5) for line in lines)
    return [Path(field[5]) for field in fields if len(field) == 6]


def _bundled_libraries() -> list[Path]:
    spec = importlib.util.find_spec("torch")  # which need not be imported yet
    if spec is None or spec.origin is None:
        return []
    root = Path(spec.origin).parent
    return sorted(
        [*(root / "lib").glob("libgomp*"), *root.with_name("torch.libs").glob("libgomp*")]
    )


def _cache_key(compiler: Sequence[str], flags: Sequence[str], runtime: Path | None) -> str:
    version = _run([*compiler, "--version"])
    parts = [*_source(), *compiler, *flags, version, _cpu_flags(), str(runtime)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cpu_flags() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    prefixes = ("model name", "flags", "Features", "CPU part")
    found = {line for line in lines if line.startswith(prefixes)}
    return "\n".join([platform.machine(), *sorted(found)])


def _compile(compiler: Sequence[str], flags: Sequence[str], runtime: Path | None, to: Path) -> None:
    """Build in a temporary directory and rename: another process never sees half a file."""
    _remove_abandoned(to.parent)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=_UNFINISHED) as directory:
        built = Path(directory) / to.name
        try:
            _compile_with_openmp(compiler, flags, runtime, built)
        except BuildError as error:
            whole = [*compiler, *flags, "-shared", str(SOURCE), "-o", str(built)]
            _run([*whole, "-lpthread", "-lm"], built.parent)
            logger.warning("native CPU kernels run on one thread: %s", error)
        _seal(built)
        built.replace(to)


def _remove_abandoned(directory: Path) -> None:
    """Remove what compilers have left that were killed."""
    for path in directory.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 2 * COMPILE_TIMEOUT_S:
                shutil.rmtree(path, ignore_errors=True)


def _compile_with_openmp(
    compiler: Sequence[str], flags: Sequence[str], runtime: Path | None, to: Path
) -> None:
    """Compile for OpenMP but link against the given runtime instead of the compiler's own."""
    if runtime is None:
        raise BuildError("torch has no libgomp to share")
    unit = to.with_suffix(".o")
    _run([*compiler, *flags, "-fopenmp", "-c", str(SOURCE), "-o", str(unit)], to.parent)
    link = [*compiler, "-shared", "-Wl,--no-undefined", str(unit), str(runtime)]
    _run([*link, "-lpthread", "-lm", "-o", str(to)], to.parent)


def _run(command: Sequence[str], directory: Path | None = None) -> str:
    """Return what a compiler prints; its own temporary files are made in a directory, if given."""
    environment = os.environ if directory is None else {**os.environ, "TMPDIR": str(directory)}
    try:
        done = subprocess.run(  # noqa: S603  the compiler, with our own arguments
            command,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0]
        raise BuildError(f"{command[0]} failed: {reason}")
    return done.stdout
