"""Reads adapters in a thread of its own, while the engine computes steps."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from ..protocol.adapters import LoadAdapter
from ..protocol.errors import (
    AdapterError,
    AdapterFault,
    ModelLoadError,
    first_line,
    no_adapter_directory,
)
from ..threads import unpin
from .adapted_layers import AdaptedLayers, FittedAdapter
from .other_ranks import NoOtherRanks, OtherRanks
from .peft_directory import read_adapter

logger = logging.getLogger(__name__)

Outcome = FittedAdapter | AdapterError


class AdapterLoader:
    """Reads adapters below a directory, one after the other.

    Args:
        layers: the model's.
        directory: where the adapters are; None if none may be loaded.

    Attributes:
        others: the ranks that read their parts of the same adapters.
    """

    def __init__(self, layers: AdaptedLayers, directory: Path | None) -> None:
        self._layers = layers
        self._directory = directory
        self.others: OtherRanks = NoOtherRanks()
        self._pending: queue.SimpleQueue[tuple[LoadAdapter, Callable[[Outcome], object]]] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    def start(self, wanted: LoadAdapter, done: Callable[[Outcome], object]) -> None:
        """Starts to read an adapter; `done` is called from another thread.

        Raises:
            AdapterError: none may be loaded.
        """
        if self._directory is None:
            raise no_adapter_directory()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
            self._thread.start()
        self._pending.put((wanted, done))

    def _run(self) -> None:
        unpin()  # the thread that started this one has a processor to itself
        while True:
            wanted, done = self._pending.get()
            done(self._outcome(wanted))

    def _outcome(self, wanted: LoadAdapter) -> Outcome:
        assert self._directory is not None
        outcome = read_fitted(self._layers, wanted, self._directory)
        if isinstance(outcome, FittedAdapter):
            try:
                self.others.read(wanted, self._directory, outcome.digest)
            except AdapterError as error:
                return error
        return outcome


def read_fitted(layers: AdaptedLayers, wanted: LoadAdapter, root: Path) -> Outcome:
    """Reads an adapter below a directory as the model's layers take it, or says why it cannot."""
    try:
        source = directory_of(wanted, root)
        return layers.fit(read_adapter(wanted.name, str(source), root))
    except AdapterError as error:
        return error
    except ModelLoadError as error:
        return AdapterError(AdapterFault.INVALID, str(error))
    except Exception as error:
        logger.exception("an adapter cannot be loaded")
        text = f"adapter {wanted.name}: {first_line(error)}"
        return AdapterError(AdapterFault.INVALID, text)


def directory_of(wanted: LoadAdapter, root: Path) -> Path:
    """The directory of an adapter, without links.

    Raises:
        AdapterError: there is none, or it is not below `root`.
    """
    try:
        found = (root / wanted.source).resolve()
    except (ValueError, OSError, RuntimeError) as error:
        text = f"adapter {wanted.name}: {first_line(error)}"
        raise AdapterError(AdapterFault.MISSING, text) from error
    # First, so that nobody can ask what there is elsewhere.
    if not found.is_relative_to(root.resolve()):
        text = f"adapter {wanted.name}: {wanted.source} is not below --lora-adapter-directory"
        raise AdapterError(AdapterFault.FORBIDDEN, text)
    if not found.is_dir():
        text = f"adapter {wanted.name}: there is no directory {wanted.source}"
        raise AdapterError(AdapterFault.MISSING, text)
    return found
