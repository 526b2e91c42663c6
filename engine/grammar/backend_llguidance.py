"""Grammars by llguidance: the only module that imports it.

    JSON Schema or regular expression --> source, a text --compile_source--> matcher

The service tries to compile a source in a process of its own before it sends it here
(`service/grammar/checker.py`), so compiling is known to be quick; the limits below only make sure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import llguidance.numpy
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from ..protocol.errors import GrammarError
from .byte_tokenizer import byte_tokenizer
from .forms import lark_source
from .pattern_properties import overlap, without_taken_patterns
from .schema import UnsaidError, exact_integers, read_schema
from .schema.endless import may_be_endless
from .schema.keywords import Schema, strings, subschemas
from .schema.numbers import add_ends
from .schema.references import with_local_references
from .tokenizer_spec import UNSPEAKABLE, fitted

# Limits of work, in the library's units. A mask takes microseconds; these stop one after some ms.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)
_MAX_FORCED = 2048  # tokens at once; each takes 2 us to spell, on the engine's thread

# Of an error: schemas of which the library lacks something that forms have.
_LACKING = ("circular references", "nsatisfiable")

# JSON as Python's json.dumps writes it: a model could repeat any other white space endlessly.
_CALL_OR_TEXT = "start: call | text\ntext: /(?s:\\s*[^{\\s].*)?/\n"
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
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
    """The source of a JSON Schema, by the library's own keywords or by the forms of its values.

    With `or_text` any text is allowed whose first visible character is not a brace. With
    `best_effort` keywords that cannot be enforced are ignored, with `strict_formats` unknown
    formats are refused.

    Raises:
        GrammarError: a keyword cannot be enforced. Compiling the source finds further ones.
    """
    if (pattern := exact_integers(schema)) is not None and not or_text:
        return regex_source(pattern)
    try:
        read = read_schema(schema, best_effort=best_effort, strict_formats=strict_formats)
        if not best_effort:
            _check_min_properties(read)
    except UnsaidError as error:
        return _source_by_forms(schema, error, or_text=or_text, strict_formats=strict_formats)
    if not best_effort and overlap(read):
        unsaid = UnsaidError('"patternProperties" that overlap cannot be enforced')
        try:
            return _source_by_forms(schema, unsaid, or_text=or_text, strict_formats=strict_formats)
        except GrammarError:  # the patterns may be of objects that have nothing to do with another
            if overlap(read, of_one_object=True):
                raise
    without_taken_patterns(read)
    return _source_of_read(read, or_text=or_text, best_effort=best_effort)


def _source_of_read(read: Schema, *, or_text: bool, best_effort: bool) -> str:
    """The source of a schema that was read, by keywords, or by forms where those are not enough.

    The library puts no end to a number without bounds, and refuses some references. A schema that
    cannot be written by forms keeps free values without an end.
    """
    source = _source_by_keywords(read, or_text=or_text, best_effort=best_effort)
    is_endless = may_be_endless(read)
    if not is_endless and "$ref" not in json.dumps(read):
        return source
    problem = _problem_of(source)
    is_lacking = any(words in problem for words in _LACKING)
    if (problem and not is_lacking) or not (is_endless or is_lacking):
        return source  # whoever compiles it is told the problem
    try:
        start, rules = lark_source(read, _json_options(read), are_closed=False)
    except GrammarError:
        add_ends(read)
        return _source_by_keywords(read, or_text=or_text, best_effort=best_effort)
    return _lark(start, rules, or_text=or_text)


def _source_by_keywords(read: Schema, *, or_text: bool, best_effort: bool) -> str:
    options = _json_options(read)
    options.update(lenient=best_effort, coerce_one_of=best_effort)
    if not or_text:
        return str(LLMatcher.grammar_from_json_schema(read, overrides=options))
    text = json.dumps({**read, "x-guidance": options})
    return str(LLMatcher.grammar_from_lark(f"{_CALL_OR_TEXT}call: %json {text}\n"))


def _source_by_forms(
    schema: dict[str, Any], unsaid: UnsaidError, *, or_text: bool, strict_formats: bool
) -> str:
    """The source of a schema that the library's own keywords cannot say.

    Raises:
        GrammarError: it cannot be enforced otherwise either.
    """
    schema = with_local_references(schema)
    options = _json_options(schema)
    try:
        start, rules = lark_source(schema, options, strict_formats=strict_formats)
    except GrammarError as error:
        if "nsatisfiable" in str(error):
            raise
        raise GrammarError(f"{unsaid}: {error}") from error
    return _lark(start, rules, or_text=or_text)


def _lark(start: str, rules: str, *, or_text: bool) -> str:
    """The source of rules, of which one is the first."""
    first = f"{_CALL_OR_TEXT}call: {start}\n" if or_text else f"start: {start}\n"
    return str(LLMatcher.grammar_from_lark(first + rules))


def _problem_of(source: str) -> str:
    """What the library finds wrong in a source; empty if nothing."""
    matcher = LLMatcher(byte_tokenizer(), source, log_level=0)
    return str(matcher.get_error()) if matcher.is_error() else ""


def _json_options(schema: dict[str, Any]) -> Any:
    escapes = _ESCAPES + "u" * bool(_NEEDS_NUMBERS.search(json.dumps(schema)))
    return {**JSON_OPTIONS, "json_allowed_escapes": escapes}


def _check_min_properties(schema: dict[str, Any]) -> None:
    """Refuses minProperties: the library counts a property that occurs twice as two.

    Raises:
        UnsaidError: a schema demands more than one property, without requiring as many by name.
    """
    for place, inner in subschemas(schema):
        least, num_required = inner.get("minProperties"), len(strings(inner.get("required")))
        if isinstance(least, (int, float)) and least > max(1, num_required):
            raise UnsaidError(
                f'"minProperties" above 1 needs as many names in "required", at {place}'
            )


def regex_source(pattern: str) -> str:
    """The source of a regular expression, which the whole text must match."""
    return str(LLMatcher.grammar_from_regex(pattern))


class LlguidanceMatcher:
    """The state of a sequence in its grammar.

    Raises:
        GrammarError: the source is not a grammar, or too complex.
    """

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.check()

    def copy(self) -> LlguidanceMatcher:
        """Another matcher in the same state; takes about 10 us."""
        return LlguidanceMatcher(self._matcher.deep_copy())

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


class MaskFiller:
    """Fills rows of masks.

    Args:
        num_threads: threads for several rows.
    """

    def __init__(self, num_threads: int) -> None:
        self._executor = LLExecutor(num_threads=num_threads)

    def fill(self, rows: list[tuple[LlguidanceMatcher, int]], masks: NDArray[np.int32]) -> None:
        """Fills the row of each matcher."""
        if len(rows) == 1:
            ((matcher, row),) = rows
            llguidance.numpy.fill_next_token_bitmask(matcher.raw, masks, row)
        elif rows:
            raw = [(matcher.raw, row) for matcher, row in rows]
            llguidance.numpy.fill_next_token_bitmask_par(self._executor, raw, masks)


def make_tokenizer(tokenizer: str, vocab_size: int, eos_token_ids: frozenset[int]) -> LLTokenizer:
    """The table of a vocabulary, for `compile_source`.

    Args:
        tokenizer: the content of tokenizer.json.
        vocab_size: width of the model's logits.
        eos_token_ids: tokens that end a text.

    Raises:
        GrammarError: the library does not support this kind of tokenizer.
    """
    try:
        return LLTokenizer(
            fitted(tokenizer, vocab_size), n_vocab=vocab_size, eos_token=sorted(eos_token_ids)
        )
    except Exception as error:  # a tokenizer can be anything
        reason = " ".join(str(error).split())
        raise GrammarError(f"the model's tokenizer has no grammars: {reason}") from error


def compile_source(source: str, tokenizer: LLTokenizer) -> LlguidanceMatcher:
    """Compiles a source.

    Raises:
        GrammarError: the source is not a grammar, or too complex.
    """
    return LlguidanceMatcher(LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS))


def texts_of(tokenizer: LLTokenizer, eos_token_ids: frozenset[int]) -> dict[bytes, list[int]]:
    """The tokens that are text, by their bytes."""
    texts: dict[bytes, list[int]] = {}
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode_bytes([token_id])
        if text and token_id not in eos_token_ids and not text.startswith(UNSPEAKABLE.encode()):
            texts.setdefault(text, []).append(token_id)
    return texts
