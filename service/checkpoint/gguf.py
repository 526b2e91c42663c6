"""The header of a GGUF file: its metadata, and where each tensor is.

transformers' own reader of it needs torch, which only the engine has. The one of the package `gguf`
makes an array of every word of a vocabulary: that takes seconds.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from .file_state import check_not_pointer
from .path import MAGIC

_VERSIONS, _ALIGNMENT = (2, 3), 32
# Types of metadata: a letter of `struct` for each, but for two.
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_LETTERS[12] = "d"
_STRING, _ARRAY = 8, 9
_EMBEDDING = "token_embd.weight"
_LAYER = re.compile(r"blk\.([0-9]{1,9})\.")
# Of special tokens, those that the tokenizer is made with.
_SPECIAL = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding"))


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        name: as llama.cpp calls it.
        shape: the dimension that is contiguous comes first.
        kind: a number of `GGMLQuantizationType`.
        offset: bytes from the start of all data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a file.

    Attributes:
        metadata: values by their keys; arrays are lists or tuples.
        data_start: bytes before the data of tensors.
        size: bytes of the whole file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]
    data_start: int
    size: int

    @property
    def tokens(self) -> list[str]:
        """The vocabulary, in the order of ids; empty if the file has none."""
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        return tokens if isinstance(tokens, list) else []

    def check(self) -> None:
        """Checks that the file is a whole model, and that its tensors can be read.

        Raises:
            ValueError: it is not; the text is one line with the path.
        """
        num_parts = self.metadata.get("split.count")
        if isinstance(num_parts, int) and num_parts > 1:
            raise ValueError(
                f"{self.path} is one of {num_parts} parts of a model; "
                "`llama-gguf-split --merge` makes one file of them"
            )
        if not isinstance(self.metadata.get("general.architecture"), str) or not self.tensors:
            raise ValueError(f"{self.path} is no model: it has no architecture or no tensors")
        self._check_layers()
        self._check_kinds()
        self._check_size()
        if not self.tokens:
            raise ValueError(f"there is no tokenizer in {self.path}: tokenizer.ggml is missing")
        self._check_special_tokens()
        self._check_embedding()

    def _check_layers(self) -> None:
        """Layers above the number of them would be left out in silence."""
        key = f"{self.metadata['general.architecture']}.block_count"
        num_layers = self.metadata.get(key)
        if not isinstance(num_layers, int):
            raise ValueError(f"{self.path} lacks {key}")
        for tensor in self.tensors:
            layer = _LAYER.match(tensor.name)
            if layer and int(layer[1]) >= num_layers:
                raise ValueError(f"{self.path} has {tensor.name}, and {key} is {num_layers}")

    def _check_special_tokens(self) -> None:
        last = len(self.tokens) - 1
        for key in _SPECIAL:
            index = self.metadata.get(key, 0)
            if not (type(index) is int and 0 <= index <= last):
                raise ValueError(f"{self.path}: {key} must be an id <= {last}. Given: {index}")

    def _check_kinds(self) -> None:
        for tensor in self.tensors:
            if not _can_be_read(tensor.kind):
                raise ValueError(
                    f"{tensor.name} in {self.path} is of type {_kind_name(tensor.kind)}, which is "
                    "not loaded; `llama-quantize --allow-requantize` converts the file, to Q8_0 "
                    "for example"
                )

    def _check_size(self) -> None:
        end = max(tensor.offset + _num_bytes(tensor) for tensor in self.tensors)
        if self.data_start + end > self.size:
            raise ValueError(
                f"{self.path} is truncated: it has {self.size} bytes of {self.data_start + end}"
            )

    def _check_embedding(self) -> None:
        rows = next((t.shape[-1] for t in self.tensors if t.name == _EMBEDDING), None)
        if rows is not None and len(self.tokens) > rows:
            raise ValueError(
                f"the tokenizer in {self.path} does not belong to this model: it has ids up to "
                f"{len(self.tokens) - 1}, and the embedding has {rows} rows"
            )


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a file.

    Raises:
        ValueError: it is no GGUF, or a broken one; the text is one line with the path.
        OSError: the file cannot be read.
    """
    check_not_pointer(path)
    size = path.stat().st_size
    if size < len(MAGIC):
        raise ValueError(f"{path} is no GGUF file: it has {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
        try:
            metadata, tensors, end = _Reader(data).header()
        except (EOFError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"the header of {path} is truncated or damaged") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment must be an integer >= 1. Given: {alignment}")
    return GgufFile(path, metadata, tensors, -(-end // alignment) * alignment, size)


class _Reader:
    """Reads one value after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(MAGIC)

    def header(self) -> tuple[dict[str, Any], tuple[Tensor, ...], int]:
        """Metadata, tensors, and where these end."""
        version, num_tensors, num_values = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} of GGUF is not known, only 2 and 3 are")
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._numbers("I")[0])
        return metadata, tuple(self._tensor() for _ in range(num_tensors)), self._at

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        form = f"<{letters}"
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise EOFError
        return self._data[start : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, length = self._numbers("IQ")
            if item_kind in _LETTERS:
                return self._numbers(f"{length}{_LETTERS[item_kind]}")
            if item_kind != _STRING:  # arrays of arrays are allowed, and nobody writes them
                raise ValueError(f"arrays of type {item_kind} in metadata are not known")
            return [self._string() for _ in range(length)]
        if kind not in _LETTERS:
            raise ValueError(f"type {kind} of metadata is not known")
        return self._numbers(_LETTERS[kind])[0]

    def _tensor(self) -> Tensor:
        name = self._string()
        (num_dims,) = self._numbers("I")
        shape = self._numbers(f"{num_dims}Q")
        kind, offset = self._numbers("IQ")
        return Tensor(name, shape, kind, offset)


@cache
def _can_be_read(kind: int) -> bool:
    """Whether tensors of a type can be turned into numbers."""
    try:
        known = GGMLQuantizationType(kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except (ValueError, NotImplementedError):
        return False
    return True


def _kind_name(kind: int) -> str:
    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return str(kind)


def _num_bytes(tensor: Tensor) -> int:
    per_block, bytes_per_block = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    return prod(tensor.shape) // per_block * bytes_per_block
