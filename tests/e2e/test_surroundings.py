"""Servers in poor surroundings: each starts, or says in one line why it does not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from tests.e2e.stack import START_S, command, running, wait_until
from tests.paths import REPOSITORY

IS_ROOT = os.geteuid() == 0
NOBODY = 54321  # a user that no file of this machine knows


def works(directory: Path, prefix: list[str], environment: dict[str, str] | None = None) -> str:
    """The log of a server that starts behind these words of a command line, and answers."""
    with running(directory / "log", prefix=prefix, environment=environment) as stack:
        assert stack.generate()["details"]["generated_tokens"] == 8
        return stack.log()


def bare(**more: str) -> dict[str, str]:
    """Nothing but where the code is."""
    return {"PYTHONPATH": str(REPOSITORY), "PATH": os.defpath, **more}


def test_without_any_environment(tmp_path: Path) -> None:
    assert "engine ready" in works(tmp_path, [], bare())


@pytest.fixture
def temporary() -> Iterator[Path]:
    """An empty directory for temporary files, of a short name: sockets are in it."""
    with TemporaryDirectory() as path:
        yield Path(path)


def test_without_a_home_that_can_be_written(tmp_path: Path, temporary: Path) -> None:
    log = works(tmp_path, [], bare(HOME="/proc/nothing", TMPDIR=str(temporary)))
    if shutil.which("cc"):
        assert "native CPU kernels" in log
        assert (temporary / f"tokenwire.{os.getuid()}").is_dir()


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc has the option that is used here")
def test_without_avx_512(tmp_path: Path) -> None:
    environment = bare(CC="gcc -mno-avx512f", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "native CPU kernels" in works(tmp_path, [], environment)
    assert len(list((tmp_path / "cache" / "tokenwire").glob("*.so"))) == 1


@pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
def test_as_a_user_without_name_and_home_in_a_directory_that_is_not_its_own(
    tmp_path: Path, temporary: Path
) -> None:
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # It may read what only root may, since this Python may be installed there; and not write.
    user += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    _skip_unless_possible([*user, sys.executable, "-c", "import os; assert os.getuid()"])
    os.chown(temporary, NOBODY, NOBODY)
    works(tmp_path, ["env", "--chdir=/", *user], bare(TMPDIR=str(temporary)))


def test_with_few_open_files(tmp_path: Path) -> None:
    log = works(tmp_path, ["prlimit", "--nofile=512:512"])
    assert "only 512 files may be open (ulimit -n); 16384 connections need 16640" in log


def test_without_room_for_temporary_files(tmp_path: Path) -> None:
    places = "mount -t tmpfs -o size=4k tmpfs"
    script = f"{places} /tmp && {places} /var/tmp"
    if REPOSITORY.is_relative_to("/tmp"):  # it has to be there still
        kept = f"mkdir -p {REPOSITORY} && mount --bind /mnt {REPOSITORY}"
        script = f"mount --bind {REPOSITORY} /mnt && {script} && {kept}"
    script += "; echo full > /tmp/x; echo full > /var/tmp/x; "
    script += '[ ! -e /usr/tmp ] && cd /proc && exec "$@"'
    done = _in_namespace("--mount", script, *command())
    assert done.returncode == 1
    assert done.stderr.startswith("tokenwire serve: [Errno 2] No usable temporary directory")
    assert done.stderr.count("\n") == 1


def test_without_ipv6(tmp_path: Path) -> None:
    script = 'ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; exec "$@"'
    done = _in_namespace("--net", script, *command("--hostname=::1"))
    assert (done.returncode, done.stderr) == (
        1,
        "tokenwire serve: port 0 on ::1 Cannot assign requested address\n",
    )
    prefix = ["unshare", "--net", "sh", "-c", script, "sh"]
    with running(tmp_path / "log", prefix=prefix) as stack:
        assert "Tokenwire is ready." in stack.log()


def _in_namespace(kind: str, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command where a script has changed the machine; skips where that is forbidden."""
    unshare = ["unshare", kind, "sh", "-c"]
    _skip_unless_possible([*unshare, script, "sh", "true"])
    return subprocess.run(
        [*unshare, script, "sh", *words],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
        env=bare(),
    )


def _skip_unless_possible(words: list[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"there is no {error.filename}")
    if done.returncode:
        pytest.skip(f"forbidden here: {done.stderr.strip()}")


def test_killed_supervisor_leaves_nothing_that_the_next_one_does_not_remove(
    tmp_path: Path, temporary: Path
) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with running(tmp_path / "log", environment=environment) as stack:
        children = stack.children()
        stack.process.send_signal(signal.SIGKILL)
        stack.process.wait()
        wait_until(lambda: not any(map(_is_alive, children)), "the end of its children")
    assert len(_directories(temporary)) == 1
    with running(tmp_path / "log2", environment=environment) as stack:
        assert len(_directories(temporary)) == 1
    assert not _directories(temporary)


def _directories(parent: Path) -> list[Path]:
    return list(parent.glob("tokenwire-*"))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
