"""The worker process that compiles grammars on trial: it may hang, grow or crash without harm.

`checker.py` asks it. It imports neither torch nor gRPC.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.grammar import backend_outlines
from engine.grammar.backend_llguidance import json_source, regex_source
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import TokenMasks
from engine.grammar.matcher import Matcher
from engine.grammar.rule_source import rule_source
from engine.protocol.errors import GrammarError

from ..workers.serving import Answer, serve_forks
from .rules import schemas_of

# Seconds of processor time: the engine compiles it again, which costs its steps a tenth of that.
# outlines-core does it without the interpreter's lock.
_MAX_COMPILE_S = {"llguidance": 0.5, "outlines": 2.0}
_LACKING = "lookarounds not supported"  # of llguidance, for an expression
_NUM_PROBES = 48  # tokens of the trial walk
_MAX_MASK_S = 0.005  # seconds of processor time per mask of the walk: about a decode step


def start(setup: Any) -> tuple[str, Callable[[], Answer]]:
    """Builds the vocabulary's table, which all forked processes share.

    Returns:
        Why there are no grammars with this tokenizer, empty if there are, and what makes answers.
    """
    tokenizer, vocab_size, eos_token_ids, backend = setup
    compiler = GrammarCompiler(tokenizer, vocab_size)
    eos = frozenset(eos_token_ids)
    problem = ""
    try:
        compiler.warm(eos, outlines=backend == "outlines")
        for source in (
            regex_source("a"),
            json_source({}),
        ):  # the first one takes longer than others
            compiler.compile(source, eos)
    except GrammarError as error:
        problem = str(error)

    def make_answer() -> Answer:
        masks = TokenMasks(vocab_size, num_threads=1)  # its threads would not survive the fork
        trial = _Trial(compiler, masks, eos)
        trial.answer({"kind": "regex", "value": "a"}, "llguidance")  # starts them
        return lambda request: trial.answer(json.loads(request), backend)

    return problem, make_answer


class _LackingError(GrammarError):
    """A library lacks what a grammar asks for, which another one may have."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """What grammars are tried with."""

    compiler: GrammarCompiler
    masks: TokenMasks
    eos: frozenset[int]

    def answer(self, request: dict[str, Any], backend: str) -> dict[str, str]:
        """{"source": ...}, or {"error": ...} with a text for the caller: the first library's.

        An error with {"part": "other"} is about what a text may fit instead.
        """
        if (reason := self._wrong_with_other(request)) is not None:
            return {"error": reason, "part": "other"}
        reason = ""
        for library in _libraries(request, backend):
            try:
                return {"source": self._tried(request, library)}
            except (GrammarError, ValueError) as error:
                reason = reason or " ".join(str(error).split())
                if not isinstance(error, _LackingError):
                    break
            except MemoryError:
                return {"error": reason or "it needs too much memory"}
        return {"error": reason}

    def _wrong_with_other(self, request: dict[str, Any]) -> str | None:
        """Why a text cannot fit another constraint instead; None if it can, or there is none."""
        if (other := request.get("other")) is None:
            return None
        if (error := self.answer(other, "llguidance").get("error")) is not None:
            return error
        source = _source({**other, "lead": None})
        for text in request["beginnings"]:
            if self._may_begin(source, text):
                return f"with tools no answer may begin like a call, but one may with {text}"
        return None

    def _may_begin(self, source: str, text: str) -> bool:
        """Whether a text that fits a source may begin so, in whatever tokens."""
        spelled = self.compiler.compile(rule_source(text, json_source), self.eos)
        matcher = self.compiler.compile(source, self.eos)
        while following := set(_allowed(spelled, self.masks).tolist()) - self.eos:
            token_id = min(following)
            spelled.advance([token_id])
            try:
                matcher.advance([token_id])
            except GrammarError:
                return False
        return True

    def _tried(self, request: dict[str, Any], library: str) -> str:
        """The source that a request asks for, of a library, after a few tokens of it.

        Raises:
            GrammarError, ValueError: there is none, it takes too long, or leads to a dead end.
        """
        source = _source_of(library, request)
        started = time.process_time()
        try:
            matcher = self.compiler.compile(source, self.eos)
        except GrammarError as error:
            raise _LackingError(error) if _LACKING in str(error) else error from None
        if time.process_time() - started > _MAX_COMPILE_S[library]:
            raise GrammarError("it is too complex: the engine would compile it for too long")
        _walk(matcher, self.masks)
        if (inner := _inner_source(request)) is not None:
            _walk(self.compiler.compile(inner, self.eos), self.masks)
        return source


def _libraries(request: dict[str, Any], backend: str) -> tuple[str, ...]:
    """The libraries to try, in order: `auto` takes the slower one for what the faster one cannot.

    outlines-core has no grammars in which free text and JSON follow each other, as in tool calls
    and behind reasoning.
    """
    is_plain = request["kind"] in ("json", "regex") and not {"lead", "other"} & request.keys()
    if backend == "llguidance" or not is_plain or request.get("or_text"):
        return ("llguidance",)
    if backend == "outlines":
        return ("outlines",)
    return ("llguidance", "outlines") if backend_outlines.is_installed() else ("llguidance",)


def _source_of(library: str, request: dict[str, Any]) -> str:
    """The source that a request asks for, of a library.

    Raises:
        _LackingError: the library lacks a keyword.
        ValueError: there is none.
    """
    try:
        return _outlines_source(request) if library == "outlines" else _source(request)
    except GrammarError as error:
        raise _LackingError(error) from error


def _outlines_source(request: dict[str, Any]) -> str:
    """The source that a request asks for, of outlines-core.

    Raises:
        GrammarError: there is none.
    """
    if request["kind"] == "regex":
        return backend_outlines.regex_source(request["value"])
    return backend_outlines.json_source(request["value"])


def _source(request: dict[str, Any]) -> str:
    """The source that a request asks for, of llguidance.

    Raises:
        GrammarError, ValueError: there is none.
    """
    schema_source = partial(
        json_source,
        best_effort=request.get("best_effort", False),
        strict_formats=request.get("strict_formats", False),
    )
    rule = _rule(request, schema_source)
    if isinstance(rule, dict) and rule.keys() == {"source"}:
        return str(rule["source"])
    return rule_source(rule, schema_source)


def _rule(request: dict[str, Any], schema_source: Callable[..., str]) -> Any:
    """What a request asks for as a rule, with what comes before it or instead of it."""
    match request["kind"]:
        case "rule":
            rule = request["value"]
        case "regex":
            rule = {"source": regex_source(request["value"])}
        case _:
            rule = {"source": schema_source(request["value"], or_text=request["or_text"])}
    if (other := request.get("other")) is not None:
        rule = {"choice": [rule, _rule(other, schema_source)]}
    lead = request.get("lead")
    return rule if lead is None else [lead, rule]


def _inner_source(request: dict[str, Any]) -> str | None:
    """The source of what stands behind text that is free, in which a walk may get lost."""
    schemas = list(schemas_of(request["value"])) if request["kind"] == "rule" else []
    if schemas:
        choice = {"choice": [{"schema": schema} for schema in schemas]}
        return _source({**request, "value": choice, "lead": None})
    return _source({**request, "lead": None}) if request.get("lead") is not None else None


def _allowed(matcher: Matcher, masks: TokenMasks) -> NDArray[np.intp]:
    """The tokens that can follow.

    Raises:
        GrammarError: the grammar is too complex.
    """
    words = masks.start([matcher]).result()[0]
    matcher.check()
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def _walk(matcher: Matcher, masks: TokenMasks) -> None:
    """Generates a few tokens: most of a grammar's cost shows only in its masks.

    Raises:
        GrammarError: there is a dead end, or a mask takes too long.
    """
    spent = 0.0
    for step in range(_NUM_PROBES):
        started = time.process_time()  # wall time would count other processes' work
        allowed = _allowed(matcher, masks)
        spent += time.process_time() - started
        if matcher.is_over:
            break
        if not len(allowed):
            raise GrammarError("no token can follow")
        # Far apart in the vocabulary from step to step, and the same in every trial.
        matcher.advance([int(allowed[(step * 7919 + 13) % len(allowed)])])
        matcher.advance(matcher.forced())
        if spent > _NUM_PROBES * _MAX_MASK_S:
            raise GrammarError("it is too complex: a token would take too long")


if __name__ == "__main__":
    serve_forks(start)
