"""Grammars, which say what tokens may come next, by llguidance.

    JSON Schema or regular expression --> source, a text --GrammarCompiler--> Matcher

The service tries to compile a source in a process of its own before it sends it here
(`service/grammar/checker.py`), so compiling is known to be quick; the limits below only make sure.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llguidance.numpy
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from ..protocol.errors import GrammarError
from ..threads import unpin
from .pattern_properties import without_taken_patterns
from .schema import exact_integers, read_schema
from .schema.keywords import strings, subschemas
from .tokenizer_spec import fitted

logger = logging.getLogger(__name__)

# Limits of work, in the library's units. A mask takes microseconds; these stop one after some ms.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)
_MAX_FORCED = 2048  # tokens at once; each takes 2 us to spell, on the engine's thread
_NICENESS = 15  # of threads that compile
_Key = tuple[str, frozenset[int]]  # a source, and the tokens that end a text
_MAX_CACHED_BYTES = 1024 * 1024  # of cached sources; compiled, they are 200 times as large …
_MAX_CACHED = 256  # … and how many: a short expression takes up to 1 MB when it is compiled

# JSON as Python's json.dumps writes it: a model could repeat any other white space endlessly.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# And no escapes by number, with which {"a": 1, "\\u0061": 2} would have the property "a" twice,
# unless the schema's JSON contains characters that have no other escape.
_ESCAPES = 'nrbtf\\"'
_NEEDS_NUMBERS = re.compile(
    r"\\u00(?:[01][0-9a-f]|7f)"
    r"|\\\\(?:[acv]|(?:x|u00|U000000)(?:[01]\w|7[fF])|[xuU]\{0*(?:[01]?[0-9A-Fa-f]|7[fF])\})"
)


def json_source(
    schema: dict[str, Any],
    *,
    or_text: bool = False,
    best_effort: bool = False,
    strict_formats: bool = False,
) -> str:
    """The source of a JSON Schema.

    With `or_text` any text is allowed whose first visible character is not a brace. With
    `best_effort` keywords that cannot be enforced are ignored, with `strict_formats` unknown
    formats are refused.

    Raises:
        GrammarError: a keyword cannot be enforced. Compiling the source finds further ones.
    """
    if (pattern := exact_integers(schema)) is not None and not or_text:
        return regex_source(pattern)
    read = read_schema(schema, best_effort=best_effort, strict_formats=strict_formats)
    if not best_effort:
        _check_min_properties(read)
    without_taken_patterns(read)
    escapes = _ESCAPES + "u" * bool(_NEEDS_NUMBERS.search(json.dumps(read)))
    options: Any = {**_JSON_OPTIONS, "json_allowed_escapes": escapes}
    options.update(lenient=best_effort, coerce_one_of=best_effort)
    if not or_text:
        return str(LLMatcher.grammar_from_json_schema(read, overrides=options))
    text = json.dumps({**read, "x-guidance": options})
    lark = f"start: call | text\ncall: %json {text}\ntext: /(?s:\\s*[^{{\\s].*)?/\n"
    return str(LLMatcher.grammar_from_lark(lark))


def _check_min_properties(schema: dict[str, Any]) -> None:
    """Refuses minProperties: the library counts a property that occurs twice as two.

    Raises:
        GrammarError: a schema demands more than one property, without requiring as many by name.
    """
    for place, inner in subschemas(schema):
        least, num_required = inner.get("minProperties"), len(strings(inner.get("required")))
        if isinstance(least, (int, float)) and least > max(1, num_required):
            raise GrammarError(
                f'"minProperties" above 1 needs as many names in "required", at {place}'
            )


def regex_source(pattern: str) -> str:
    """The source of a regular expression, which the whole text must match."""
    return str(LLMatcher.grammar_from_regex(pattern))


class Matcher:
    """The state of a sequence in its grammar.

    Raises:
        GrammarError: the source is not a grammar, or too complex.
    """

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.check()

    def copy(self) -> Matcher:
        """Another matcher in the same state; takes about 10 us."""
        return Matcher(self._matcher.deep_copy())

    def advance(self, token_ids: Sequence[int]) -> None:
        """Consumes tokens.

        Raises:
            GrammarError: the grammar does not allow them.
        """
        self._matcher.consume_tokens(list(token_ids))
        self.check()

    def forced(self) -> list[int]:
        """The tokens that must come next, in the tokenizer's own spelling; often none.

        Raises:
            GrammarError: there are too many of them.
        """
        if self._matcher.is_stopped():
            return []
        forced = [int(token_id) for token_id in self._matcher.compute_ff_tokens()]
        if len(forced) > _MAX_FORCED:
            raise GrammarError(f"it leaves no choice about more than {_MAX_FORCED} tokens")
        return forced

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end of the text can follow."""
        return bool(self._matcher.is_stopped())

    def check(self) -> None:
        """Raises an error of the last call, or of the last mask that was filled.

        Raises:
            GrammarError: the grammar is too complex, or allows no token.
        """
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())

    @property
    def raw(self) -> LLMatcher:
        """The matcher of llguidance."""
        return self._matcher


class GrammarCompiler:
    """Compiles sources for one tokenizer and caches the results, errors included.

    Args:
        tokenizer: the content of tokenizer.json.
        vocab_size: width of the model's logits.
    """

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tokenizers: dict[frozenset[int], LLTokenizer | GrammarError] = {}
        self._tokenizers_lock = threading.Lock()  # held while one is built, up to some seconds
        self._lock = threading.Lock()
        self._cache: OrderedDict[_Key, Matcher | GrammarError] = OrderedDict()
        self._cached_bytes = 0
        self._workers = ThreadPoolExecutor(
            2, thread_name_prefix="grammar", initializer=_lower_priority
        )

    def warm(self, eos_token_ids: frozenset[int]) -> None:
        """Builds the table of the vocabulary, which the first grammar would wait for.

        Raises:
            GrammarError: the library does not support this kind of tokenizer.
        """
        self._tokenizer_for(eos_token_ids)

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
            tokenizer = self._tokenizer_for(eos_token_ids)
            return Matcher(LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS))
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

    def _tokenizer_for(self, eos_token_ids: frozenset[int]) -> LLTokenizer:
        """The table of the vocabulary, or the same error each time.

        Raises:
            GrammarError: the library does not support this kind of tokenizer.
        """
        with self._tokenizers_lock:
            tokenizer = self._tokenizers.get(eos_token_ids)
            if tokenizer is None:
                tokenizer = self._build(eos_token_ids)
                self._tokenizers[eos_token_ids] = tokenizer
        if isinstance(tokenizer, GrammarError):
            raise tokenizer
        return tokenizer

    def _build(self, eos_token_ids: frozenset[int]) -> LLTokenizer | GrammarError:
        try:
            return LLTokenizer(
                fitted(self._tokenizer, self._vocab_size),
                n_vocab=self._vocab_size,
                eos_token=sorted(eos_token_ids),
            )
        except Exception as error:  # a tokenizer can be anything
            reason = " ".join(str(error).split())
            return GrammarError(f"the model's tokenizer has no grammars: {reason}")

    def _keep(self, key: _Key, compiled: Matcher | GrammarError) -> None:
        with self._lock:
            if key not in self._cache:
                self._cached_bytes += len(key[0])
            self._cache[key] = compiled
            while len(self._cache) > _MAX_CACHED or (
                self._cached_bytes > _MAX_CACHED_BYTES and len(self._cache) > 1
            ):
                (source, _), _ = self._cache.popitem(last=False)
                self._cached_bytes -= len(source)


def _lower_priority() -> None:
    """Lets the step loop and other threads run first: compiling delays only its own request."""
    unpin()
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class TokenMasks:
    """Fills the masks of a step while the model's forward runs.

    Args:
        vocab_size: width of the model's logits.
        num_threads: threads that fill.
    """

    def __init__(self, vocab_size: int, num_threads: int = 2) -> None:
        self._num_words = -(-vocab_size // 32)
        self._executor = LLExecutor(num_threads=num_threads)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks", initializer=unpin)

    def start(self, matchers: Sequence[Matcher]) -> Future[NDArray[np.int32]]:
        """Starts to fill int32 [len(matchers), ceil(vocab_size / 32)].

        Bit i % 32 of word i // 32 is set if token i is allowed. Once the masks are filled, each
        matcher's `check` raises if its row is invalid.
        """
        return self._thread.submit(self._fill, list(matchers))

    def _fill(self, matchers: list[Matcher]) -> NDArray[np.int32]:
        masks = np.zeros((len(matchers), self._num_words), dtype=np.int32)
        if len(matchers) == 1:
            llguidance.numpy.fill_next_token_bitmask(matchers[0].raw, masks, 0)
        else:
            rows = [(matcher.raw, row) for row, matcher in enumerate(matchers)]
            llguidance.numpy.fill_next_token_bitmask_par(self._executor, rows, masks)
        return masks
