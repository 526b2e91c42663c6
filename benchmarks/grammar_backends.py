"""What the two libraries for grammars take, by size of the vocabulary.

For each tokenizer the tables of both libraries are built, as an engine builds them. Each grammar is
then compiled in a process of its own that is forked of this one: processor time until its first
mask is there, what the process grew by, and processor time per token (mask and step) along texts
that are chosen at random among the allowed tokens. A process that takes longer than the limit is
killed. Processor time is what counts, since others may use the machine.

    .venv/bin/python -m benchmarks.grammar_backends --tokenizer tokenizer.json --vocab-size 128256

Without arguments it takes the bundled model's tokenizer and those that `make tokenizers` fetches.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import machine
from benchmarks.report import table
from engine.grammar import backend_llguidance, backend_outlines
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import TokenMasks
from engine.protocol.errors import GrammarError
from service.workers.heap import trim
from tests.paths import DEMO_MODEL
from tests.tokenizers.checkpoints import VOCAB_SIZES, folder

NAMES = ("llama3_1", "gemma3")
MIB = 1024 * 1024
NUM_TOKENS = 64  # of a text
NUM_TEXTS = 5
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, str | dict[str, Any]] = {
    "choice of three": "yes|no|maybe",
    "date": r"\d{4}-\d{2}-\d{2}",
    "object of two": PERSON,
    "line of 40": r"[^\n]{1,40}",
    "ten objects": {"type": "array", "items": PERSON, "maxItems": 10},
    "string of 20": {"type": "string", "maxLength": 20},
}
Source = Callable[..., str]
LIBRARIES: dict[str, tuple[Source, Source]] = {
    "llguidance": (backend_llguidance.regex_source, backend_llguidance.json_source),
    "outlines": (backend_outlines.regex_source, backend_outlines.json_source),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer, and the time and memory that the libraries' tables of it take."""

    name: str
    vocab_size: int
    compiler: GrammarCompiler
    eos: frozenset[int]
    table_s: dict[str, float]
    table_mib: dict[str, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """What a grammar takes; None if it was not finished in time."""

    vocab_size: int
    grammar: str
    library: str
    first_mask_ms: float | None
    token_us: float | None
    mib: float | None
    error: str = ""


def read_vocabulary(name: str, path: Path, vocab_size: int) -> Vocabulary:
    """Builds the tables of a vocabulary."""
    text = path.read_text()
    added = json.loads(text)["added_tokens"]
    eos = frozenset([max(token["id"] for token in added if token["id"] < vocab_size)])
    compiler = GrammarCompiler(text, vocab_size)
    seconds: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for library in LIBRARIES:
        started, before = time.process_time(), resident()
        compiler.warm(eos, outlines=library == "outlines")
        seconds[library] = time.process_time() - started
        sizes[library] = resident() - before
    return Vocabulary(name, vocab_size, compiler, eos, seconds, sizes)


def resident() -> float:
    """Memory of this process in MiB, without what the C heap has kept."""
    trim()
    return float(psutil.Process().memory_info().rss) / MIB


def measure(vocabulary: Vocabulary, name: str, library: str, limit_s: float) -> Figure:
    """Compiles a grammar in a process of its own."""
    context = multiprocessing.get_context("fork")  # it shares the tables
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(vocabulary, name, library, theirs))
    process.start()
    theirs.close()
    answer: dict[str, Any] = {"error": f"> {limit_s:g} s"}
    if ours.poll(limit_s):
        answer = ours.recv()
    process.kill()
    process.join()
    nothing = dict.fromkeys(("first_mask_ms", "token_us", "mib"))
    return Figure(vocabulary.vocab_size, name, library, **{**nothing, **answer})


def _measure(vocabulary: Vocabulary, name: str, library: str, pipe: Any) -> None:
    masks = TokenMasks(vocabulary.vocab_size, num_threads=1)
    regex_source, json_source = LIBRARIES[library]
    grammar = GRAMMARS[name]
    before, started = resident(), time.process_time()
    try:
        source = regex_source(grammar) if isinstance(grammar, str) else json_source(grammar)
        matcher = vocabulary.compiler.compile(source, vocabulary.eos)
    except GrammarError as error:
        pipe.send({"error": str(error)})
        return
    masks.start([matcher]).result()
    answer = {
        "first_mask_ms": 1000 * (time.process_time() - started),
        "mib": max(0.0, resident() - before),
    }
    pipe.send({**answer, "token_us": _token_us(vocabulary, source, masks)})


def _token_us(vocabulary: Vocabulary, source: str, masks: TokenMasks) -> float:
    """Processor time of a token's mask and step, along a few texts."""
    draws = random.Random(0)
    spent, count = 0.0, 0
    for _ in range(NUM_TEXTS):
        matcher = vocabulary.compiler.compile(source, vocabulary.eos)
        for _ in range(NUM_TOKENS):
            started = time.process_time()
            words = masks.start([matcher]).result()[0]
            spent += time.process_time() - started
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            token_id = int(draws.choice(allowed.tolist()))
            count += 1
            if token_id in vocabulary.eos:
                break
            started = time.process_time()
            matcher.advance([token_id])
            matcher.advance(matcher.forced())
            is_over = matcher.is_over
            spent += time.process_time() - started
            if is_over:
                break
    return 1e6 * spent / count


def report(vocabularies: list[Vocabulary], figures: list[Figure]) -> str:
    """The tables."""
    tables = [
        [
            vocabulary.name,
            f"{vocabulary.vocab_size:,}",
            library,
            f"{vocabulary.table_s[library]:.2f}",
            f"{vocabulary.table_mib[library]:.0f}",
        ]
        for vocabulary in vocabularies
        for library in LIBRARIES
    ]
    rows = [
        [
            f"{figure.vocab_size:,}",
            figure.grammar,
            figure.library,
            *map(shown, (figure.first_mask_ms, figure.token_us, figure.mib)),
            figure.error,
        ]
        for figure in figures
    ]
    head = ["vocabulary", "grammar", "library", "first mask, ms", "us per token", "MiB", ""]
    first = table(["tokenizer", "vocabulary", "library", "table, s", "MiB"], tables)
    return f"{first}\n\n{table(head, rows)}"


def shown(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def options_from_command_line() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--vocab-size", type=int, help="width of that model's logits")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for a grammar")
    parser.add_argument("--tiny", action="store_true", help="three grammars, the bundled model's")
    return parser.parse_args()


def read_vocabularies(options: argparse.Namespace) -> list[Vocabulary]:
    """The tokenizer that was asked for, or those that are there."""
    if options.tokenizer is not None:
        path = options.tokenizer
        return [read_vocabulary(path.parent.name, path, options.vocab_size)]
    found = [read_vocabulary("bundled", DEMO_MODEL / "tokenizer.json", 4096)]
    for name in () if options.tiny else NAMES:
        if folder(name).is_dir():
            path = folder(name) / "tokenizer.json"
            found.append(read_vocabulary(name, path, VOCAB_SIZES[name]))
    return found


def main() -> None:
    """Measures and prints."""
    options = options_from_command_line()
    vocabularies = read_vocabularies(options)
    figures = [
        measure(vocabulary, name, library, options.limit)
        for vocabulary in vocabularies
        for name in list(GRAMMARS)[: 3 if options.tiny else None]
        for library in LIBRARIES
    ]
    described = machine.describe()
    print(machine.line(described))
    print(report(vocabularies, figures))
    tables = [
        {"vocab_size": item.vocab_size, "seconds": item.table_s, "mib": item.table_mib}
        for item in vocabularies
    ]
    results = [asdict(figure) for figure in figures]
    print(json.dumps({"machine": described, "tables": tables, "figures": results}))


if __name__ == "__main__":
    main()
