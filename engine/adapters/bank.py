"""Which adapters are loaded, and which of them are on the device.

It belongs to the thread that runs steps. Files are read, checked and laid out by a thread of the
loader, so that an adapter costs the others no more than its copy into place.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from ..protocol.adapters import AdapterInfo, LoadAdapter
from ..protocol.errors import AdapterError, AdapterFault, unknown_adapter
from .adapted_layers import AdaptedLayers, FittedAdapter
from .loader import AdapterLoader, Outcome
from .other_ranks import NoOtherRanks, OtherRanks

logger = logging.getLogger(__name__)


class _Named(NamedTuple):
    source: str
    adapter: FittedAdapter


class AdapterBank:
    """The adapters by their names, and by their digests, by which requests choose them.

    One that was unloaded stays until the last request that uses it has ended.

    Args:
        layers: the model's.
        max_loaded: how many can be loaded.
        loader: reads adapters while the engine runs.
    """

    def __init__(self, layers: AdaptedLayers, max_loaded: int, loader: AdapterLoader) -> None:
        self.layers = layers
        self.max_loaded = max_loaded
        self._loader = loader
        self._others: OtherRanks = NoOtherRanks()
        self._names: dict[str, _Named] = {}
        self._loaded: dict[str, FittedAdapter] = {}  # by digest
        self._num_uses: Counter[str] = Counter()  # by digest: requests that have not ended
        self._slots: OrderedDict[str, int] = OrderedDict()  # by digest, the least recent first
        self._free = [*reversed(range(layers.num_slots))]
        self._coming: dict[str, LoadAdapter] = {}  # by name
        self._waiting: list[Callable[[], object]] = []  # for what comes

    @property
    def max_resident(self) -> int:
        """How many adapters can be on the device, and so in a step."""
        return self.layers.num_slots

    @property
    def loaded(self) -> Mapping[str, FittedAdapter]:
        """All that is loaded, by digest."""
        return self._loaded

    def lead(self, others: OtherRanks) -> None:
        """From now on other ranks, with the same adapters, get and lose what this one does."""
        self._others = self._loader.others = others

    def listed(self) -> tuple[AdapterInfo, ...]:
        """The adapters that requests can name."""
        return tuple(
            AdapterInfo(name, named.source, named.adapter.digest, named.adapter.rank)
            for name, named in self._names.items()
        )

    def digest(self, name: str) -> str:
        """That of the adapter of a name.

        Raises:
            KeyError: there is none.
        """
        return self._names[name].adapter.digest

    def has(self, digest: str) -> bool:
        """Whether requests can use the adapter."""
        return digest in self._loaded

    def is_coming(self, wanted: LoadAdapter) -> bool:
        """Whether just these files are being loaded by this name, or it is the same call's wish."""
        return bool(wanted.digest or wanted.call) and self._coming.get(wanted.name) == wanted

    def wait(self, digest: str, done: Callable[[], object]) -> bool:
        """Whether an adapter is on its way; `done` is called when it is there, or will not come."""
        is_coming = any(one.digest == digest for one in self._coming.values())
        if not digest or digest in self._loaded or not is_coming:
            return False
        self._waiting.append(done)
        return True

    def use(self, digest: str) -> None:
        """Keeps an adapter until `leave`."""
        self._num_uses[digest] += 1

    def leave(self, digest: str) -> None:
        """Ends a use."""
        self._num_uses[digest] -= 1
        self._drop_unused(digest)

    def begin(self, wanted: LoadAdapter, done: Callable[[Outcome], object]) -> None:
        """Starts to load an adapter.

        Args:
            wanted: the adapter.
            done: is called from another thread with what `finish` takes.

        Raises:
            AdapterError: it cannot be loaded.
        """
        self._check_room(wanted)
        self._coming[wanted.name] = wanted
        try:
            self._loader.start(wanted, done)
        except AdapterError:
            del self._coming[wanted.name]
            raise

    def finish(self, wanted: LoadAdapter, outcome: Outcome) -> None:
        """Puts an adapter that was read into place.

        Raises:
            AdapterError: it cannot be used.
        """
        del self._coming[wanted.name]
        waiting, self._waiting = self._waiting, []
        try:
            if isinstance(outcome, FittedAdapter) and wanted.digest not in ("", outcome.digest):
                outcome = AdapterError(
                    AdapterFault.INVALID,
                    f"adapter {wanted.name}: its files are not those that were loaded before",
                )
            if isinstance(outcome, AdapterError):
                self._others.discard(wanted.name)
                raise outcome
            self.add(wanted.name, wanted.source, outcome)
        finally:
            for done in waiting:
                done()

    def add(self, name: str, source: str, adapter: FittedAdapter) -> None:
        """Takes over an adapter, in place of one of the same name.

        Raises:
            AdapterError: there is not enough memory for it.
        """
        try:
            self._others.adopt(name, adapter.digest)
            self.layers.reserve(adapter)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if adapter.digest not in self._loaded:
                self._others.drop(adapter.digest)
            raise AdapterError(
                AdapterFault.TOO_MANY, f"adapter {name}: the device has too little memory for it"
            ) from error
        before = self._names.get(name)
        adapter = self._loaded.setdefault(adapter.digest, adapter)
        self._names[name] = _Named(source, adapter)
        if before is not None:
            self._drop_unused(before.adapter.digest)
        if self._free:
            self.slots((adapter.digest,))
        logger.info("adapter %s: %d updates, rank %d", name, len(adapter.updates), adapter.rank)

    def remove(self, name: str) -> None:
        """Takes a name away; requests that use its adapter end first.

        Raises:
            AdapterError: there is no adapter of this name.
        """
        named = self._names.pop(name, None)
        if named is None:
            raise unknown_adapter(name)
        self._drop_unused(named.adapter.digest)
        logger.info("adapter %s was unloaded", name)

    def slots(self, digests: Collection[str]) -> list[int]:
        """Where adapters are on the device; those that are not there take the place of others."""
        for digest in digests:
            if digest in self._slots:
                self._slots.move_to_end(digest)
            else:
                self._bring(digest, digests)
        return [self._slots[digest] for digest in digests]

    def _bring(self, digest: str, wanted: Collection[str]) -> None:
        if not self._free:
            least = next(other for other in self._slots if other not in wanted)
            self._free.append(self._slots.pop(least))
        slot = self._free.pop()
        self.layers.put(slot, self._loaded[digest])
        self._others.put(slot, digest)
        self._slots[digest] = slot

    def _check_room(self, wanted: LoadAdapter) -> None:
        """Checks that an adapter may be added.

        Raises:
            AdapterError: it may not.
        """
        name = wanted.name
        if name in self._coming or (name in self._names and not wanted.replaces):
            text = f"The adapter `{name}` has already been loaded"
            if name in self._coming:
                text = f"The adapter `{name}` is being loaded"
            raise AdapterError(AdapterFault.LOADED, text)
        if len({*self._names, *self._coming, name}) > self.max_loaded:
            raise AdapterError(
                AdapterFault.TOO_MANY,
                f"{self.max_loaded} adapters are loaded, the most there can be: unload one",
            )

    def _drop_unused(self, digest: str) -> None:
        """Frees what an adapter takes, unless a name or a request has it."""
        is_named = any(named.adapter.digest == digest for named in self._names.values())
        if is_named or self._num_uses[digest]:
            return
        del self._num_uses[digest]
        self._loaded.pop(digest, None)
        slot = self._slots.pop(digest, None)
        if slot is not None:
            self.layers.put(slot, None)
            self._others.put(slot, None)
            self._free.append(slot)
        self._others.drop(digest)
