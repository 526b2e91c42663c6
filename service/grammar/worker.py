"""The worker process that compiles grammars on trial: it may hang, grow or crash without harm.

`checker.py` asks it. It imports neither torch nor gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.grammar.backend_llguidance import (
    GrammarCompiler,
    Matcher,
    TokenMasks,
    json_source,
    regex_source,
)
from engine.protocol.errors import GrammarError

from ..workers.serving import serve

# Seconds of processor time: the engine compiles it again, which costs its steps a tenth of that.
_MAX_COMPILE_S = 0.5
_NUM_PROBES = 48  # tokens of the trial walk
_MAX_MASK_S = 0.005  # seconds of processor time per mask of the walk: about a decode step


def start(setup: Any) -> Callable[[dict[str, Any]], dict[str, str]]:
    """Loads the tokenizer, and compiles a first grammar: it takes longer than those that follow."""
    tokenizer, vocab_size, eos_token_ids = setup
    compiler = GrammarCompiler(tokenizer, vocab_size)
    eos = frozenset(eos_token_ids)
    masks = TokenMasks(vocab_size, num_threads=1)

    def answer(request: dict[str, Any]) -> dict[str, str]:
        return _answer(request, compiler, masks, eos)

    answer({"kind": "regex", "value": "a"})
    return answer


def _answer(
    request: dict[str, Any], compiler: GrammarCompiler, masks: TokenMasks, eos: frozenset[int]
) -> dict[str, str]:
    """{"source": ...}, or {"error": ...} with a text for the caller."""
    try:
        if request["kind"] == "regex":
            source = regex_source(request["value"])
        else:
            source = json_source(
                request["value"], or_text=request["or_text"], best_effort=request["best_effort"]
            )
        started = time.process_time()
        matcher = compiler.compile(source, eos)
        if time.process_time() - started > _MAX_COMPILE_S:
            raise GrammarError("it is too complex: the engine would compile it for too long")
        _walk(matcher, masks)
    except (GrammarError, ValueError) as error:
        return {"error": " ".join(str(error).split())}
    except MemoryError:
        return {"error": "it needs too much memory"}
    return {"source": source}


def _walk(matcher: Matcher, masks: TokenMasks) -> None:
    """Generates a few tokens: most of a grammar's cost shows only in its masks.

    Raises:
        GrammarError: there is a dead end, or a mask takes too long.
    """
    spent = 0.0
    for step in range(_NUM_PROBES):
        started = time.process_time()  # wall time would count other processes' work
        words = masks.start([matcher]).result()[0]
        spent += time.process_time() - started
        matcher.check()
        if matcher.is_over:
            break
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if not len(allowed):
            raise GrammarError("no token can follow")
        # Far apart in the vocabulary from step to step, and the same in every trial.
        matcher.advance([int(allowed[(step * 7919 + 13) % len(allowed)])])
        matcher.advance(matcher.forced())
        if spent > _NUM_PROBES * _MAX_MASK_S:
            raise GrammarError("it is too complex: a token would take too long")


if __name__ == "__main__":
    serve(start)
