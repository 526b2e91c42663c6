"""Grammars: which tokens may come next. The only file that knows the library behind it.

    JSON Schema or regular expression --> source, a text --GrammarCompiler--> Matcher

A source is checked in a process of its own before it comes here (`service/grammar/checker.py`), so
that compiling it is known to be quick; this side only bounds it again.
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

logger = logging.getLogger(__name__)

# Bounds of work, in the library's units. A mask takes microseconds; these end one after some ms.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)
_MAX_FORCED = 2048  # tokens at once; spelling them takes 2 us each, on the engine's thread
_NICENESS = 15  # of threads that compile
_Key = tuple[str, frozenset[int]]  # a source, and the tokens that end a text
_MAX_CACHED_BYTES = 1024 * 1024  # of sources whose compiled form, 200 times as large, is kept …
_MAX_CACHED = 256  # … and how many: a short expression takes up to 1 MB when it is compiled

# JSON as Python's json.dumps writes it: no other white space, on which a model could loop.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# And no escapes by number, with which {"a": 1, "\\u0061": 2} would say something about "a" twice,
# unless a schema speaks, in its JSON, of characters that have no other escape.
_ESCAPES = 'nrbtf\\"'
_NEEDS_NUMBERS = re.compile(
    r"\\u00(?:[01][0-9a-f]|7f)"
    r"|\\\\(?:[acv]|(?:x|u00|U000000)(?:[01]\w|7[fF])|[xuU]\{0*(?:[01]?[0-9A-Fa-f]|7[fF])\})"
)
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_NO_SCHEMAS = ("const", "enum", "default", "examples")


def json_source(schema: dict[str, Any], *, or_text: bool = False, best_effort: bool = False) -> str:
    """The source of a JSON Schema.

    With `or_text` a text whose first visible character is no brace is free. With `best_effort`
    keywords that cannot be enforced are ignored.

    Raises:
        GrammarError: a keyword cannot be enforced; others are found when the source is compiled.
    """
    if not best_effort:
        _check_min_properties(schema)
    escapes = _ESCAPES + "u" * bool(_NEEDS_NUMBERS.search(json.dumps(schema)))
    options: Any = {**_JSON_OPTIONS, "json_allowed_escapes": escapes}
    options.update(lenient=best_effort, coerce_one_of=best_effort)
    # A caller's own options would switch the enforcement off.
    bounded = {key: value for key, value in schema.items() if key != "x-guidance"}
    if not or_text:
        return str(LLMatcher.grammar_from_json_schema(bounded, overrides=options))
    text = json.dumps({**bounded, "x-guidance": options})
    lark = f"start: call | text\ncall: %json {text}\ntext: /(?s:\\s*[^{{\\s].*)?/\n"
    return str(LLMatcher.grammar_from_lark(lark))


def _check_min_properties(schema: Any) -> None:
    """Refuses objects of a least size: the library would count a name that comes twice as two."""
    if isinstance(schema, list):
        for item in schema:
            _check_min_properties(item)
    if not isinstance(schema, dict):
        return
    least, required = schema.get("minProperties"), schema.get("required")
    num_required = len(required) if isinstance(required, list) else 0
    if isinstance(least, (int, float)) and least > max(1, num_required):
        raise GrammarError('"minProperties" above 1 needs as many names in "required"')
    for key, value in schema.items():
        if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            _check_min_properties(list(value.values()))
        elif key not in _NO_SCHEMAS:
            _check_min_properties(value)


def regex_source(pattern: str) -> str:
    """The source of a regular expression, which the whole text must match."""
    return str(LLMatcher.grammar_from_regex(pattern))


class Matcher:
    """A sequence's place in its grammar.

    Raises:
        GrammarError: the source is no grammar, or too complex.
    """

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.check()

    def copy(self) -> Matcher:
        """Another one at the same place, about 10 us."""
        return Matcher(self._matcher.deep_copy())

    def advance(self, token_ids: Sequence[int]) -> None:
        """Goes on behind tokens.

        Raises:
            GrammarError: they are not allowed.
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
        """Raises what the last call, or filling a mask, has come upon.

        Raises:
            GrammarError: the grammar is too complex, or has come to a dead end.
        """
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())

    @property
    def raw(self) -> LLMatcher:
        """The library's object."""
        return self._matcher


class GrammarCompiler:
    """Compiles sources for one tokenizer, in threads of its own, and keeps what it has compiled.

    Args:
        tokenizer: the tokenizer.json, as text.
        vocab_size: width of the model's logits.
    """

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tokenizers: dict[frozenset[int], LLTokenizer] = {}
        self._tokenizers_lock = threading.Lock()  # held while one is made, up to a second
        self._lock = threading.Lock()
        self._cache: OrderedDict[_Key, Matcher | GrammarError] = OrderedDict()
        self._cached_bytes = 0
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="grammar", initializer=_give_way)

    def compile(self, source: str, eos_token_ids: frozenset[int]) -> Matcher:
        """A matcher at the beginning; any thread may call it.

        Raises:
            GrammarError: the source is no grammar, or too complex.
        """
        key = (source, eos_token_ids)
        compiled = self._find(key)
        if compiled is None:
            try:
                tokenizer = self._tokenizer_for(eos_token_ids)
                compiled = Matcher(LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS))
            except GrammarError as error:
                compiled = error
            except Exception as error:  # a library and a tokenizer.json may fail in any way
                logger.exception("a grammar failed to compile")
                compiled = GrammarError(f"it cannot be compiled: {type(error).__name__}")
            self._keep(key, compiled)
        if isinstance(compiled, GrammarError):
            raise compiled
        return compiled.copy()

    def condemn(self, source: str, eos_token_ids: frozenset[int], error: GrammarError) -> None:
        """Lets `compile` refuse a source from now on."""
        self._keep((source, eos_token_ids), error)

    def is_ready(self, source: str, eos_token_ids: frozenset[int]) -> bool:
        """Whether `compile` would answer at once."""
        return self._find((source, eos_token_ids)) is not None

    def prepare(
        self, source: str, eos_token_ids: frozenset[int], done: Callable[[], object]
    ) -> None:
        """Compiles in the background and calls `done` from there, whatever came of it."""
        future: Future[Matcher] = self._workers.submit(self.compile, source, eos_token_ids)
        future.add_done_callback(lambda _: done())

    def _find(self, key: _Key) -> Matcher | GrammarError | None:
        with self._lock:
            compiled = self._cache.get(key)
            if compiled is not None:
                self._cache.move_to_end(key)
            return compiled

    def _tokenizer_for(self, eos_token_ids: frozenset[int]) -> LLTokenizer:
        with self._tokenizers_lock:
            tokenizer = self._tokenizers.get(eos_token_ids)
            if tokenizer is None:
                try:
                    tokenizer = LLTokenizer(
                        _unspeakable(self._tokenizer),
                        n_vocab=self._vocab_size,
                        eos_token=sorted(eos_token_ids),
                    )
                except ValueError as error:  # a kind of tokenizer that the library does not know
                    raise GrammarError(f"the model's tokenizer has no grammars: {error}") from error
                self._tokenizers[eos_token_ids] = tokenizer
            return tokenizer

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


def _unspeakable(tokenizer: str) -> str:
    """A tokenizer whose special tokens have names that no text contains.

    The library spells a text that must follow as the tokenizer would, and a tokenizer reads the
    text "<|end|>" as the token that ends everything.
    """
    spec = json.loads(tokenizer)
    special = [token for token in spec.get("added_tokens") or () if token["special"]]
    names = {token["content"]: f"\ufdd0{token['id']}" for token in special}
    for token in special:
        token["content"] = names[token["content"]]
    model = spec.get("model") or {}
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    elif isinstance(vocab, list):  # Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    spec["post_processor"] = None  # it adds special tokens, by name
    return json.dumps(spec)


def _give_way() -> None:
    """Lets other threads go first: whoever waits for a grammar waits for nothing else."""
    unpin()
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class TokenMasks:
    """The masks of a step, filled beside the model's forward.

    Args:
        vocab_size: width of the model's logits.
        num_threads: threads that fill.
    """

    def __init__(self, vocab_size: int, num_threads: int = 2) -> None:
        self._num_words = -(-vocab_size // 32)
        self._executor = LLExecutor(num_threads=num_threads)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks", initializer=unpin)

    def start(self, matchers: Sequence[Matcher]) -> Future[NDArray[np.int32]]:
        """Begins to fill: int32 [len(matchers), ceil(vocab_size / 32)], bit i % 32 of word i // 32.

        Afterwards each matcher's `check` says whether its row means anything.
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
