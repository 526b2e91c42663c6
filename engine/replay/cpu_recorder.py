"""Computations on the CPU, written down while they are done, to be repeated without Python.

A graph holds the calls of kernels and of torch's operations, at fixed addresses. What a program did
to get to them is left out: it is assumed to come out the same whatever the numbers are.
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
    """A model does something that may come out differently with the same shapes."""


class Arena:
    """Memory of all graphs, of which only one runs at a time.

    As with torch's own allocator, a piece is given out again when no tensor needs it any more, so
    that a step's numbers stay in the processor's caches. It cannot be torch's own, since the pieces
    are written to whenever a graph is played.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, Tensor] = {}  # by address
        self._num_users: Counter[int] = Counter()  # tensors on a piece, by its address
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by size

    @property
    def num_bytes(self) -> int:
        """The size of all pieces."""
        return sum(piece.nbytes for piece in self._pieces.values())

    def like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor of the same shape, strides and format."""
        piece = self._piece(tensor)
        copy = torch.empty(0, dtype=tensor.dtype)
        copy.set_(piece.untyped_storage(), 0, tensor.shape, tensor.stride())
        self.watch(copy)
        return copy

    def watch(self, tensor: Tensor) -> bool:
        """Counts a tensor among those that need their piece while they live, if it lies here."""
        address = _address(tensor)
        if address not in self._pieces:
            return False
        self._num_users[address] += 1
        weakref.finalize(tensor, self._leave, address).atexit = False
        return True

    def _piece(self, tensor: Tensor) -> Tensor:
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        # In powers of two, so that shapes of all sizes can share a few pieces.
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
    """What was computed, as calls that take and return nothing.

    Args:
        parts: calls of kernels, and everything else, in order.
        kernels: make one call of several.
        constants: what it reads and nobody else may keep.
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
        """Computes it again from what its inputs hold now.

        Raises:
            MemoryError: a kernel found none.
        """
        for run in self._runs:
            run()


class CpuGraphRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Listens to what is computed while it is entered.

    What operations return lies in the arena from then on. The record refers to it by tensors of its
    own, so that pieces are free as soon as the model has dropped them.

    Args:
        arena: where results go.
        kernels: those that the model calls.
    """

    def __init__(self, arena: Arena, kernels: CpuKernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena = arena
        self._kernels = kernels
        self._parts: list[Call | Callable[[], object]] = []
        self._constants: dict[int, Tensor] = {}  # by address

    def graph(self) -> CpuGraph:
        """The record so far."""
        return CpuGraph(self._parts, self._kernels, list(self._constants.values()))

    def heard(self, call: Call) -> None:
        """Notes the call of a kernel."""
        self._parts.append(call)

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of every operation.

        Raises:
            NotRepeatableError: the operation cannot be repeated.
        """
        inputs = list(_tensors((args, kwargs)))
        operation = _Operation(op, args, kwargs or {}, inputs)
        operation.check()
        if not kwargs and (taken := self._in_a_kernel(op, args)) is not None:
            return taken
        result = op(*args, **operation.kwargs)
        places = set(map(_address, inputs))
        if torch.Tag.inplace_view in op.tags:  # it does something to Python's object only
            if _address(result) not in places:
                raise NotRepeatableError(f"{op} gives a tensor other memory")
            return result
        if operation.writes:
            self._parts.append(operation.again())
            return result
        if all(_address(tensor) in places for tensor in _tensors(result)):  # views, or none at all
            for tensor in _tensors(result):
                if not self._arena.watch(tensor):
                    self._constants[_address(tensor)] = twin(tensor)
            return result
        kept = tree_map_only(Tensor, lambda tensor: self._arena.like(tensor).copy_(tensor), result)
        targets = [twin(tensor) for tensor in _tensors(kept)]
        if not op._schema.name.startswith(_EMPTY):
            constants = None if inputs else list(_tensors(result))
            self._parts.append(operation.into(targets, constants))
        return kept

    def _in_a_kernel(self, op: OpOverload, args: tuple[Any, ...]) -> Tensor | None:
        """Computes what is small and in every model, if it is that.

        It takes torch longer to find out what to do than to do it.
        """
        if op is _aten.add.Tensor and len(args) == 2 and all(map(_is_plain, args)):
            a, b = args
            if a.shape == b.shape:
                total = self._arena.like(a)
                self._kernels.add(a, b, total)
                return total
        if op is _aten.embedding.default and _is_plain(args[0]):
            return self._taken(args[0], args[1])
        if op is _aten.index.Tensor and _is_plain(args[0]) and args[0].dim() == 3:
            x, index = args
            if len(x) == 1 and len(index) == 2 and index[0] is None and index[1].dim() == 1:
                return self._taken(x[0], index[1].unsqueeze(0))
        return None

    def _taken(self, x: Tensor, index: Tensor) -> Tensor | None:
        """Rows of x [N, width]: [..., width] for an index [...]."""
        if index.dtype is not torch.int64 or not index.is_contiguous():
            return None
        rows = self._arena.like(x.new_empty(*index.shape, x.shape[1]))
        self._kernels.take_rows(x, index.view(-1), rows.view(-1, x.shape[1]))
        return rows


@dataclass(frozen=True, slots=True)
class _Operation:
    """An operation of torch with its arguments, of which `inputs` are tensors."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]

    @property
    def writes(self) -> bool:
        """Whether it changes one of its arguments."""
        return bool(self.op._schema.is_mutable)

    def check(self) -> None:
        """Refuses what may come out differently."""
        has_mask = any(tensor.dtype is torch.bool for tensor in self.inputs)
        if self.op is _aten.index.Tensor and not has_mask:
            return  # its shape depends on nothing else
        if self.op is _aten.dropout.default and not self.args[2]:
            return  # it is not training, and drops nothing
        if not _UNREPEATABLE.isdisjoint(self.op.tags):
            raise NotRepeatableError(f"{self.op} depends on more than a step's shape")

    def again(self) -> Callable[[], object]:
        """Does it, for what it writes."""
        op, (args, kwargs) = self.op, self._twins()
        return lambda: op(*args, **kwargs)

    def into(self, targets: list[Tensor], constants: list[Tensor] | None) -> Callable[[], object]:
        """Does it and leaves the results in `targets`; what has no inputs is copied from before."""
        op, (args, kwargs) = self.op, self._twins()
        if op._schema.name in _COPIES:
            return lambda: targets[0].copy_(args[0])
        if constants is None and (out := _out_variant(op)) is not None:
            return lambda: out(*args, **kwargs, out=targets[0])

        def run() -> None:
            results = constants if constants is not None else _tensors(op(*args, **kwargs))
            for target, result in zip(targets, results, strict=True):
                target.copy_(result)

        return run

    def _twins(self) -> Any:
        return tree_map_only(Tensor, twin, (self.args, self.kwargs))


@cache
def _out_variant(op: OpOverload) -> OpOverload | None:
    """The same operation as one that writes its only result to a tensor, if there is one.

    Those that torch makes of others may go another way there, and round otherwise.
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
    """Whether our kernels can read it."""
    return isinstance(value, Tensor) and value.dtype is torch.float32 and value.is_contiguous()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def twin(tensor: Tensor) -> Tensor:
    """Another tensor at the same place, which does not count as one of the arena's users."""
    return tensor.detach()
