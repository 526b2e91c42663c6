"""Lets transformers read a GGUF file once, and its vocabulary without an array for every word.

The package `gguf`, with which it reads, makes five arrays of every number and every word in a
file's header, of which vocabularies have hundreds of thousands; and transformers reads the header
for the configuration and for the weights, and makes a table of all names of tensors for every
module of a model. That took most of the time until such a model was loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType


@contextmanager
def quick_gguf() -> Iterator[None]:
    """Within it transformers reads the header of a file at most once."""
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    quick: dict[str, Any] = {"GGUFReader": cache(_Reader), "get_tensor_name_map": cache(names)}
    vars(gguf).update(quick)
    try:
        yield
    finally:
        vars(gguf).update(GGUFReader=reader, get_tensor_name_map=names)


class _Reader(GGUFReader):
    """A reader whose arrays in the header are read as a whole."""

    def __init__(self, path: os.PathLike[str] | str) -> None:
        super().__init__(path, "r")

    @property
    def data(self) -> Any:
        """The file's bytes."""
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)  # the same memory, of which slices are made quicker

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        """Bytes that a value takes, its parts, which of them are the value's, and their types."""
        is_array = raw_type == GGUFValueType.ARRAY and self.byte_order == "I"  # this machine's
        found = self._array(orig_offs) if is_array else None
        return super()._get_field_parts(orig_offs, raw_type) if found is None else found

    def _array(self, start: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]] | None:
        """The same of an array; None of one that is empty or of arrays."""
        kind, length = self._get(start, np.uint32), self._get(start + 4, np.uint64)
        item, count, header = GGUFValueType(kind[0]), int(length[0]), 12
        if not count or item is GGUFValueType.ARRAY:
            return None
        if item is GGUFValueType.STRING:
            size, items = self._strings(start + header, count)
        else:
            numbers = self._get(start + header, self.gguf_scalar_to_np[item], count)
            size, items = numbers.nbytes, list(numbers.reshape(-1, 1))
        parts = [kind, length, *items]
        return header + size, parts, list(range(2, len(parts))), [GGUFValueType.ARRAY, item]

    def _strings(self, start: int, count: int) -> tuple[int, list[Any]]:
        """Bytes that strings take, and each of them."""
        data = memoryview(self._data)
        items, at = [], start
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(data[at:begin], "little")
            items.append(bytes(data[begin:at]))
        return at - start, items
