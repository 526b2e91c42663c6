"""Compiles grammars for one tokenizer, by the library that a source is of, and keeps the results.

The service tries to compile a source in a process of its own before it sends it here
(`service/grammar/checker.py`), so compiling is known to be quick.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..protocol.errors import GrammarError
from ..threads import unpin
from . import backend_outlines
from .backend_llguidance import compile_source, make_tokenizer, texts_of
from .backend_outlines import OutlinesMatcher
from .matcher import Matcher

logger = logging.getLogger(__name__)

_NICENESS = 15  # of threads that compile
_Key = tuple[str, frozenset[int]]  # a source, and the tokens that end a text
_BYTES_PER_CHARACTER = 200  # of what llguidance has compiled
_MAX_CACHED_BYTES = 200 * 1024 * 1024  # of what is compiled …
_MAX_CACHED = 256  # … and how many: a short expression takes up to 1 MB when it is compiled


@dataclass(slots=True)
class _Table:
    """A vocabulary as each library needs it; outlines-core's only once it is asked for."""

    llguidance: Any
    outlines: Any = None


class GrammarCompiler:
    """Compiles sources for one tokenizer and caches the results, errors included.

    Args:
        tokenizer: the content of tokenizer.json.
        vocab_size: width of the model's logits.
    """

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tables: dict[frozenset[int], _Table | GrammarError] = {}
        self._tables_lock = threading.Lock()  # held while one is built, up to some seconds
        self._lock = threading.Lock()
        self._cache: OrderedDict[_Key, Matcher | GrammarError] = OrderedDict()
        self._cached_bytes = 0
        self._workers = ThreadPoolExecutor(
            2, thread_name_prefix="grammar", initializer=_lower_priority
        )

    def warm(self, eos_token_ids: frozenset[int], *, outlines: bool = False) -> None:
        """Builds the table of the vocabulary, which the first grammar would wait for.

        With `outlines` also that of outlines-core.

        Raises:
            GrammarError: a library does not support this kind of tokenizer, or is not installed.
        """
        table = self._table(eos_token_ids)
        if outlines:
            self._vocabulary(table, eos_token_ids)

    def compile(self, source: str, eos_token_ids: frozenset[int]) -> Matcher:
        """Compiles a source, or takes it from the cache. Any thread may call this.

        Returns:
            A matcher in its initial state.

        Raises:
            GrammarError: the source is not a grammar, or too complex.
        """
        key = (source, eos_token_ids)
        compiled = self._find(key)
        if compiled is None:
            compiled = self._compile(source, eos_token_ids)
            self._keep(key, compiled)
        if isinstance(compiled, GrammarError):
            raise compiled
        return compiled.copy()

    def reject(self, source: str, eos_token_ids: frozenset[int], error: GrammarError) -> None:
        """Makes `compile` raise this error for a source from now on."""
        self._keep((source, eos_token_ids), error)

    def is_ready(self, source: str, eos_token_ids: frozenset[int]) -> bool:
        """Whether `compile` finds the source in its cache."""
        return self._find((source, eos_token_ids)) is not None

    def prepare(
        self, source: str, eos_token_ids: frozenset[int], done: Callable[[], object]
    ) -> None:
        """Compiles in a background thread, which then calls `done`, also after an error."""
        future: Future[Matcher] = self._workers.submit(self.compile, source, eos_token_ids)
        future.add_done_callback(lambda _: done())

    def _compile(self, source: str, eos_token_ids: frozenset[int]) -> Matcher | GrammarError:
        try:
            table = self._table(eos_token_ids)
            if not backend_outlines.is_ours(source):
                return compile_source(source, table.llguidance)
            vocabulary = self._vocabulary(table, eos_token_ids)
            return backend_outlines.compile_index(
                source, vocabulary, eos_token_ids, self._vocab_size
            )
        except GrammarError as error:
            return error
        except Exception as error:  # the library may raise anything
            logger.exception("a grammar failed to compile")
            return GrammarError(f"it cannot be compiled: {type(error).__name__}")

    def _find(self, key: _Key) -> Matcher | GrammarError | None:
        with self._lock:
            compiled = self._cache.get(key)
            if compiled is not None:
                self._cache.move_to_end(key)
            return compiled

    def _table(self, eos_token_ids: frozenset[int]) -> _Table:
        """The tables of the vocabulary, or the same error each time.

        Raises:
            GrammarError: the tokenizer cannot be used.
        """
        with self._tables_lock:
            table = self._tables.get(eos_token_ids)
            if table is None:
                table = self._new_table(eos_token_ids)
                self._tables[eos_token_ids] = table
        if isinstance(table, GrammarError):
            raise table
        return table

    def _new_table(self, eos_token_ids: frozenset[int]) -> _Table | GrammarError:
        try:
            return _Table(make_tokenizer(self._tokenizer, self._vocab_size, eos_token_ids))
        except GrammarError as error:
            return error

    def _vocabulary(self, table: _Table, eos_token_ids: frozenset[int]) -> Any:
        """The vocabulary for outlines-core, built when it is first needed."""
        with self._tables_lock:
            if table.outlines is None:
                texts = texts_of(table.llguidance, eos_token_ids)
                table.outlines = backend_outlines.make_vocabulary(texts, eos_token_ids)
            return table.outlines

    def _keep(self, key: _Key, compiled: Matcher | GrammarError) -> None:
        with self._lock:
            self._forget(key)
            self._cache[key] = compiled
            self._cached_bytes += _size(key, compiled)
            while len(self._cache) > _MAX_CACHED or (
                self._cached_bytes > _MAX_CACHED_BYTES and len(self._cache) > 1
            ):
                self._forget(next(iter(self._cache)))

    def _forget(self, key: _Key) -> None:
        compiled = self._cache.pop(key, None)
        if compiled is not None:
            self._cached_bytes -= _size(key, compiled)


def _size(key: _Key, compiled: Matcher | GrammarError) -> int:
    """About what a compiled source takes in memory, in bytes."""
    if isinstance(compiled, OutlinesMatcher):
        return compiled.num_bytes
    return len(key[0]) * _BYTES_PER_CHARACTER


def _lower_priority() -> None:
    """Lets the step loop and other threads run first: compiling delays only its own request."""
    unpin()
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
