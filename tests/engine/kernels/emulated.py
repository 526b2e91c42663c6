"""The kernels compiled for AArch64, called in an emulator like a library of this process.

A pointer is looked up among the tensors that were asked for their addresses; their memory goes to
the emulator's process with the call and comes back with the result.
"""

from __future__ import annotations

import bisect
import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from engine.kernels import build
from engine.kernels.kernel import FLOAT, POINTER

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
_ROOT = "/usr/aarch64-linux-gnu"  # its C library
_STRICT = ("-Wall", "-Wextra", "-Werror")
_MAIN = Path(__file__).with_name("emulated_main.c")


def compile_kernels(to: Path, *options: str) -> None:
    """Compiles the kernels for AArch64, as `build.py` does, and refuses every warning."""
    command = [COMPILER, *build.FLAGS, *_STRICT, *options, "-fopenmp", "-shared"]
    subprocess.run([*command, str(build.SOURCE), "-lm", "-o", str(to)], check=True)


@dataclass(slots=True)
class Memory:
    """The memory of tensors whose addresses were asked for; they stay alive with it."""

    _starts: list[int] = field(default_factory=list)
    _storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def note(self, tensor: torch.Tensor) -> None:
        """Remembers a tensor's memory."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start and start not in self._storages:
            bisect.insort(self._starts, start)
            self._storages[start] = storage

    def around(self, pointer: int) -> tuple[int, int]:
        """The beginning of the memory that an address is in, and its size in bytes."""
        start = self._starts[bisect.bisect_right(self._starts, pointer) - 1]
        size = self._storages[start].nbytes()
        assert start <= pointer <= start + size, "an address that is of no tensor"
        return start, size


class EmulatedLibrary:
    """What `CpuKernels` uses of a library; programs of recorded calls cannot be run."""

    def __init__(self, process: subprocess.Popen[bytes], memory: Memory) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input: IO[bytes] = process.stdin
        self._output: IO[bytes] = process.stdout
        self._memory = memory
        self._functions: dict[str, _Function] = {}

    def __getitem__(self, name: str) -> Any:
        if name.startswith("tw_replay_"):
            return ctypes.c_void_p(0)
        return self._functions.setdefault(name, _Function(self, name))

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def call(self, name: str, types: tuple[type[Any], ...], arguments: tuple[Any, ...]) -> int:
        """Calls a function in the emulator."""
        pairs = list(zip(types, arguments, strict=True))
        around = {
            value: self._memory.around(value) for kind, value in pairs if kind is POINTER and value
        }
        buffers = list(dict.fromkeys(around.values()))
        self._write(len(name), name.encode(), len(buffers))
        for start, size in buffers:
            self._write(size, ctypes.string_at(start, size))
        self._write(len(pairs))
        for kind, value in pairs:
            if kind is FLOAT:
                self._write(2, struct.pack("d", value), 0)
            elif kind is POINTER and value:
                self._write(1, buffers.index(around[value]), value - around[value][0])
            else:
                self._write(0, int(value or 0), 0)
        self._input.flush()
        (result,) = struct.unpack("q", self._read(8))
        for start, size in buffers:
            ctypes.memmove(start, self._read(size), size)
        return int(result)

    def _write(self, *parts: int | bytes) -> None:
        for part in parts:
            self._input.write(part if isinstance(part, bytes) else struct.pack("q", part))

    def _read(self, size: int) -> bytes:
        data = self._output.read(size)
        assert len(data) == size, "the emulated process has ended"
        return data


class _Function:
    """A function with the attributes of one of ctypes."""

    restype: Any = None
    argtypes: tuple[type[Any], ...] = ()

    def __init__(self, library: EmulatedLibrary, name: str) -> None:
        self._library, self._name = library, name

    def __call__(self, *arguments: Any) -> int:
        return self._library.call(self._name, self.argtypes, arguments)


@contextmanager
def emulated_library(directory: Path, *options: str) -> Iterator[EmulatedLibrary]:
    """Compiles the kernels with more options and runs them in the emulator.

    Where there is no compiler or no emulator, the test is skipped.
    """
    if not (shutil.which(COMPILER) and shutil.which(EMULATOR)):
        pytest.skip(f"no {COMPILER} or no {EMULATOR}")
    library, program = directory / "cpu.so", directory / "main"
    compile_kernels(library, *options)
    subprocess.run([COMPILER, "-O1", *_STRICT, str(_MAIN), "-ldl", "-o", str(program)], check=True)
    command = [EMULATOR, "-L", _ROOT, str(program), str(library)]
    memory, data_ptr = Memory(), torch.Tensor.data_ptr

    def noted(tensor: torch.Tensor) -> int:
        memory.note(tensor)
        return data_ptr(tensor)

    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(torch.Tensor, "data_ptr", noted)
        patch.setattr(
            "engine.kernels.cpu_library._ARENA_BYTES", 1
        )  # each weight has memory of its own
        yield EmulatedLibrary(process, memory)
