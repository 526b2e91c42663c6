"""Records a computation on the CPU while it runs, to replay it without the Python code around it.

A graph holds the calls of kernels and of torch's operations, with their fixed addresses. The Python
code that made these calls does not run again: it is assumed to make the same ones for any numbers.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..kernels.cpu import CpuKernels
from ..kernels.kernel import Call

_UNREPEATABLE = {
    torch.Tag.data_dependent_output,  # the host reads a number
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
_EMPTY = ("aten::empty", "aten::new_empty")  # also empty_like, empty_strided
_COPIES = {"aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous"}

_aten = torch.ops.aten


class NotRepeatableError(Exception):
    """A model does something whose result may differ between steps of the same shape."""


class Arena:
    """The memory of all graphs, of which only one runs at a time.

    As in torch's own allocator, a piece is reused when no tensor needs it any more, so that a
    step's numbers stay in the processor's caches. It cannot be torch's own memory, which torch
    would allocate to other tensors, since every replay writes to the pieces.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, Tensor] = {}  # by address
        self._num_users: Counter[int] = Counter()  # tensors on a piece, by its address
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by size

    @property
    def num_bytes(self) -> int:
        """The size of all pieces in bytes."""
        return sum(piece.nbytes for piece in self._pieces.values())

    def like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor of the same shape, strides and format."""
        piece = self._piece(tensor)
        copy = torch.empty(0, dtype=tensor.dtype)
        copy.set_(piece.untyped_storage(), 0, tensor.shape, tensor.stride())
        self.watch(copy)
        return copy

    def watch(self, tensor: Tensor) -> bool:
        """Keeps the piece under a tensor allocated until the tensor is deleted.

        Returns:
            Whether the tensor's memory is in the arena at all.
        """
        address = _address(tensor)
        if address not in self._pieces:
            return False
        self._num_users[address] += 1
        weakref.finalize(tensor, self._leave, address).atexit = False
        return True

    def _piece(self, tensor: Tensor) -> Tensor:
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        # Sizes are powers of two, so that tensors of all shapes can share a few pieces.
        size = 1 << ((last + 1) * tensor.itemsize - 1).bit_length() if tensor.numel() else 1
        if free := self._free[size]:
            return free.pop()
        piece = torch.empty(size, dtype=torch.uint8)
        self._pieces[piece.data_ptr()] = piece
        return piece

    def _leave(self, address: int) -> None:
        self._num_users[address] -= 1
        if not self._num_users[address]:
            piece = self._pieces[address]
            self._free[piece.nbytes].append(piece)


class CpuGraph:
    """A recorded computation, as functions without arguments and results.

    Args:
        parts: calls of kernels, and functions for everything else, in order.
        kernels: combine consecutive calls of kernels into one.
        constants: tensors that it reads, kept since the model may delete them.
    """

    def __init__(
        self,
        parts: list[Call | Callable[[], object]],
        kernels: CpuKernels,
        constants: list[Tensor],
    ) -> None:
        self._constants = constants
        self._runs: list[Callable[[], object]] = []
        calls: list[Call] = []
        for part in [*parts, None]:
            if isinstance(part, Call):
                calls.append(part)
                continue
            if calls:
                self._runs.append(kernels.program(calls).run)
                calls = []
            if part is not None:
                self._runs.append(part)

    def replay(self) -> None:
        """Computes it again from the numbers that its inputs hold now.

        Raises:
            MemoryError: a kernel could not allocate scratch memory.
        """
        for run in self._runs:
            run()


class CpuGraphRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is computed in its context.

    Results of operations are moved into the arena. The recording refers to them by aliases, which
    do not count as users, so that a piece is free as soon as the model has deleted its tensors.

    Args:
        arena: the memory of the results.
        kernels: the kernels that the model calls.
    """

    def __init__(self, arena: Arena, kernels: CpuKernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena = arena
        self._kernels = kernels
        self._parts: list[Call | Callable[[], object]] = []
        self._constants: dict[int, Tensor] = {}  # by address

    def graph(self) -> CpuGraph:
        """The recording so far."""
        return CpuGraph(self._parts, self._kernels, list(self._constants.values()))

    def record_call(self, call: Call) -> None:
        """Records the call of a kernel."""
        self._parts.append(call)

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Torch calls this in place of every operation.

        Raises:
            NotRepeatableError: the operation cannot be replayed.
        """
        inputs = list(_tensors((args, kwargs)))
        operation = _Operation(op, args, kwargs or {}, inputs)
        operation.check()
        if not kwargs and (computed := self._by_kernel(op, args)) is not None:
            return computed
        result = op(*args, **operation.kwargs)
        addresses = set(map(_address, inputs))
        if torch.Tag.inplace_view in op.tags:  # it changes the tensor object, not its memory
            if _address(result) not in addresses:
                raise NotRepeatableError(f"{op} gives a tensor other memory")
            return result
        if operation.writes:
            self._parts.append(operation.in_place())
            return result
        if all(_address(tensor) in addresses for tensor in _tensors(result)):  # views, or no tensor
            for tensor in _tensors(result):
                if not self._arena.watch(tensor):
                    self._constants[_address(tensor)] = alias(tensor)
            return result
        return self._moved(operation, result)

    def _moved(self, operation: _Operation, result: Any) -> Any:
        """Copies results into the arena, and records the operation that writes them there."""
        moved = tree_map_only(Tensor, lambda tensor: self._arena.like(tensor).copy_(tensor), result)
        targets = [alias(tensor) for tensor in _tensors(moved)]
        if not operation.op._schema.name.startswith(_EMPTY):
            constants = None if operation.inputs else list(_tensors(result))
            self._parts.append(operation.into(targets, constants))
        return moved

    def _by_kernel(self, op: OpOverload, args: tuple[Any, ...]) -> Tensor | None:
        """Computes some small operations that every model has by kernels of our own.

        In torch, their dispatch takes longer than their computation. None for other operations.
        """
        if op is _aten.add.Tensor and len(args) == 2 and all(map(_is_plain, args)):
            a, b = args
            if a.shape == b.shape:
                total = self._arena.like(a)
                self._kernels.add(a, b, total)
                return total
        if op is _aten.embedding.default and _is_plain(args[0]):
            return self._take_rows(args[0], args[1])
        if op is _aten.index.Tensor and _is_plain(args[0]) and args[0].dim() == 3:
            x, index = args
            if len(x) == 1 and len(index) == 2 and index[0] is None and index[1].dim() == 1:
                return self._take_rows(x[0], index[1].unsqueeze(0))
        return None

    def _take_rows(self, x: Tensor, index: Tensor) -> Tensor | None:
        """Rows of x [N, width]: [..., width] for an int64 index [...]; None for other indices."""
        if index.dtype is not torch.int64 or not index.is_contiguous():
            return None
        rows = self._arena.like(x.new_empty(*index.shape, x.shape[1]))
        self._kernels.take_rows(x, index.view(-1), rows.view(-1, x.shape[1]))
        return rows


@dataclass(frozen=True, slots=True)
class _Operation:
    """A call of an operation of torch; `inputs` are the tensors among its arguments."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]

    @property
    def writes(self) -> bool:
        """Whether it changes one of its arguments."""
        return bool(self.op._schema.is_mutable)

    def check(self) -> None:
        """Refuses operations whose results may differ between steps of the same shape.

        Raises:
            NotRepeatableError: this is one of them.
        """
        has_mask = any(tensor.dtype is torch.bool for tensor in self.inputs)
        if self.op is _aten.index.Tensor and not has_mask:
            return  # without a mask, its shape depends on the indices' shapes alone
        if self.op is _aten.dropout.default and not self.args[2]:
            return  # not in training, so nothing is dropped
        if not _UNREPEATABLE.isdisjoint(self.op.tags):
            raise NotRepeatableError(f"{self.op} depends on more than a step's shape")

    def in_place(self) -> Callable[[], object]:
        """A function that calls it again, for an operation that writes to its arguments."""
        op, (args, kwargs) = self.op, self._arguments()
        return lambda: op(*args, **kwargs)

    def into(self, targets: list[Tensor], constants: list[Tensor] | None) -> Callable[[], object]:
        """A function that calls it again and writes the results to `targets`.

        `constants` are the results of an operation without inputs, which are copied instead.
        """
        op, (args, kwargs) = self.op, self._arguments()
        if op._schema.name in _COPIES:
            return lambda: targets[0].copy_(args[0])
        if constants is None and (out := _out_variant(op)) is not None:
            return lambda: out(*args, **kwargs, out=targets[0])

        def run() -> None:
            results = constants if constants is not None else _tensors(op(*args, **kwargs))
            for target, result in zip(targets, results, strict=True):
                target.copy_(result)

        return run

    def _arguments(self) -> Any:
        """Positional and keyword arguments, with aliases for tensors."""
        return tree_map_only(Tensor, alias, (self.args, self.kwargs))


@cache
def _out_variant(op: OpOverload) -> OpOverload | None:
    """The overload of an operation that writes its only result to a given tensor, if there is one.

    Not for operations that torch composes of others: their `out` overloads may be composed
    differently, and round differently.
    """
    if op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
        return None

    def inputs(overload: OpOverload) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]

    packet = op.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        num_outputs = sum(a.is_out for a in overload._schema.arguments)
        if num_outputs == 1 and inputs(overload) == inputs(op):
            return overload  # type: ignore[no-any-return]
    return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in a tree of lists, tuples and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that our kernels can read."""
    return isinstance(value, Tensor) and value.dtype is torch.float32 and value.is_contiguous()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def alias(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, which does not count as one of the arena's users."""
    return tensor.detach()
