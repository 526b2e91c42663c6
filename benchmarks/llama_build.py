"""Builds the server of llama.cpp from source, once, in a directory of its own.

The source package of llama-cpp-python contains all of llama.cpp, so an ordinary package index is
enough. Nothing is installed into the environment of this project. The first build takes about ten
minutes on two cores.

    .venv/bin/python -m benchmarks.llama_build
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "0.3.36"  # of llama-cpp-python
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",  # the instructions of this machine, as for our kernels
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # would be downloaded
    "LLAMA_OPENSSL": "OFF",
}


class PeerAbsentError(Exception):
    """A peer is not available on this machine; the message says why."""


def cache_directory() -> Path:
    """The directory that peers are built in."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tokenwire" / "peers"


def server_binary() -> Path:
    """Returns the path of `llama-server`, building it first if it does not exist.

    Raises:
        PeerAbsentError: it cannot be built.
    """
    home = cache_directory() / f"llama.cpp-{VERSION}"
    binary = home / "build" / "bin" / "llama-server"
    if not binary.exists():
        home.mkdir(parents=True, exist_ok=True)
        _build(home)
    return binary


def _build(home: Path) -> None:
    print(f"building llama.cpp in {home}; about ten minutes", file=sys.stderr, flush=True)
    tools, build = home / "tools", home / "build"
    if not (tools / "bin" / "cmake").exists():
        _run(home, sys.executable, "-m", "venv", str(tools))
        _run(home, *_pip(tools), "install", "cmake", "ninja")
    source = _source(home, tools)
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'bin' / 'ninja'}"
    cmake = str(tools / "bin" / "cmake")
    _run(home, cmake, "-S", str(source), "-B", str(build), "-G", "Ninja", ninja, *options)
    _run(home, cmake, "--build", str(build), "--target", "llama-server")


def _source(home: Path, tools: Path) -> Path:
    """Fetches and unpacks the source package; returns the directory of llama.cpp."""
    source = home / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if source.exists():
        return source
    name = "llama-cpp-python"
    download = ["download", f"{name}=={VERSION}", "--no-deps", "--no-binary", name]
    _run(home, *_pip(tools), *download, "--dest", str(home))
    with tarfile.open(home / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
        archive.extractall(home, filter="data")
    return source


def _pip(tools: Path) -> list[str]:
    return [str(tools / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]


def _run(home: Path, *command: str) -> None:
    """Runs a command; its output goes to `build.log`.

    Raises:
        PeerAbsentError: it failed; the message has the end of its output.
    """
    log = home / "build.log"
    with log.open("ab") as output:
        try:
            subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = log.read_text(errors="replace").split("\n")
            said = " | ".join(line for line in lines[-6:] if line)
            raise PeerAbsentError(f"llama.cpp cannot be built ({error}): {said}") from error


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(server_binary())
