"""How long choosing tokens takes in a step, by kind of request, beside transformers' processors.

Ours is `engine.sampling.sampler.sample` until its tokens are on the host, and their appending to
sequences that began with 1,000 tokens. The peer does what `generate` does with a batch whose rows
all want the same: its processors in its order, softmax, multinomial or argmax, the new tokens put
after the old ones; and then the log-probability of the choice, out of the same softmax. It has no
frequency
penalty, and its likeliest tokens are those of `torch.topk`. Kinds that do not draw must choose the
same tokens in both arms, or the script fails.

A model's logits are peaked. Here they are 1.5 * log(vocabulary / rank), a Zipf law over a
permutation of the tokens, plus normal noise times 2: another permutation for each row, and other
noise and permutations in each round. What the 50 likeliest hold is printed. Contexts are drawn from
a Zipf law too, so that tokens repeat as they do in a text.

All kinds take turns in every round, at every number of rows; medians count. Before each step a
large buffer is read, as a forward reads its weights, so that caches are full of something else, and
then the logits are written. The limit is to read them once at the rate of that buffer; from a cache
it can be faster.

    .venv/bin/python -m benchmarks.sampling

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from benchmarks import machine
from benchmarks.ceilings import Reader, synchronise
from benchmarks.random_model import VOCAB_SIZE
from benchmarks.report import table
from engine.protocol.request import Request, SamplingParams
from engine.sampling.sampler import sample
from engine.scheduling.sequence import Sequence
from engine.threads import num_processors

CHAT = SamplingParams(do_sample=True, temperature=0.7, top_k=50, top_p=0.95)
# TGI draws as soon as a temperature or a filter is given, and for no penalty.
KINDS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(do_sample=True),
    "chat: temperature 0.7, top_k 50, top_p 0.95": CHAT,
    "temperature 0.7, top_p 0.95": replace(CHAT, top_k=None),
    "typical_p 0.95": SamplingParams(do_sample=True, typical_p=0.95),
    "repetition_penalty 1.1": SamplingParams(repetition_penalty=1.1),
    "frequency_penalty 0.5": SamplingParams(frequency_penalty=0.5),
    "chat, repetition_penalty 1.1": replace(CHAT, repetition_penalty=1.1),
    "top_n_tokens 5": SamplingParams(top_n_tokens=5),
}
_ZIPF = 1.5
_NOISE = 2.0
_TOP = 50
_TOLERANCE = 1e-3  # between two log-probabilities of one token


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    vocab_size: int
    rows: tuple[int, ...]
    context: int = 1000  # tokens
    read_bytes: int


@dataclass(slots=True)
class Seconds:
    """Of one kind of request at one number of rows, a value per round."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The medians; `transformers_ms` is None where it has no such thing."""

    kind: str
    rows: int
    ours_ms: float
    transformers_ms: float | None
    ratio: float | None
    of_the_limit: float

    @classmethod
    def of(cls, kind: str, rows: int, seconds: Seconds) -> Figure:
        """From the rounds."""
        ours = statistics.median(seconds.ours)
        theirs = statistics.median(seconds.theirs) if seconds.theirs else None
        shares = [a / b for a, b in zip(seconds.limit, seconds.ours, strict=True)]
        return cls(
            kind=kind,
            rows=rows,
            ours_ms=ours * 1000,
            transformers_ms=None if theirs is None else theirs * 1000,
            ratio=None if theirs is None else theirs / ours,
            of_the_limit=statistics.median(shares),
        )

    def cells(self) -> list[str]:
        """For a table."""
        theirs = "-" if self.transformers_ms is None else f"{self.transformers_ms:.3f}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        share = f"{self.of_the_limit:.1%}"
        return [self.kind, str(self.rows), f"{self.ours_ms:.3f}", theirs, ratio, share]


class Ours:
    """The engine's sampler, and the sequences it chooses for.

    Args:
        params: of all rows, which differ in their seeds.
        contexts: int64 [num_rows, context], on the host.
    """

    def __init__(self, params: SamplingParams, contexts: Tensor) -> None:
        self._sequences: list[Sequence] = []
        for row, ids in enumerate(contexts.tolist()):
            request = Request(
                request_id=str(row),
                prompt_token_ids=tuple(ids),
                max_new_tokens=2**31,
                sampling=replace(params, seed=row),
            )
            self._sequences.append(Sequence(request))

    def step(self, logits: Tensor) -> list[tuple[int, float]]:
        """The tokens of a step, and their log-probabilities."""
        tokens = sample(logits, [*self._sequences]).wait()
        for sequence, token in zip(self._sequences, tokens, strict=True):
            sequence.append(token.token_id)
        return [(token.token_id, token.logprob) for token in tokens]


class Theirs:
    """What `generate` does between two forwards (GenerationMixin._sample of transformers 5.23).

    Args:
        params: of all rows.
        contexts: int64 [num_rows, context], where the logits will be.
    """

    def __init__(self, params: SamplingParams, contexts: Tensor) -> None:
        self._params = params
        self._ids = contexts
        self._processors = processors(params)

    def step(self, logits: Tensor) -> list[tuple[int, float]]:
        """The tokens of a step, and their log-probabilities."""
        scores = self._processors(self._ids, logits)  # type: ignore[arg-type]  # a LongTensor
        probs = torch.softmax(scores, dim=-1)
        if self._params.do_sample:
            ids = torch.multinomial(probs, num_samples=1)
        else:
            ids = scores.argmax(dim=-1, keepdim=True)
        found = [ids, probs.gather(1, ids).log()]
        if self._params.top_n_tokens:
            top = torch.topk(probs, self._params.top_n_tokens)
            found += [top.indices, top.values.log()]
        self._ids = torch.cat([self._ids, ids], dim=-1)
        # In one copy, and in float32, as ours.
        return [(int(row[0]), row[1]) for row in torch.cat(found, dim=1).tolist()]


def processors(params: SamplingParams) -> LogitsProcessorList:
    """Those that `generate` makes of the same parameters, in its order."""
    found = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        found.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None:
        found.append(TopPLogitsWarper(params.top_p))
    if params.typical_p is not None:
        found.append(TypicalLogitsWarper(params.typical_p))
    return found


def peaked_logits(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Float32 [num_rows, vocab_size], as the module says."""
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float32)
    bonus = _ZIPF * torch.log(vocab_size / ranks)
    orders = [torch.randperm(vocab_size, generator=generator) for _ in range(num_rows)]
    noise = torch.randn(num_rows, vocab_size, generator=generator) * _NOISE
    return noise + bonus[torch.stack(orders)]


def contexts(num_rows: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Int64 [num_rows, context]: the token of rank r is drawn with a probability near 1 / r."""
    order = torch.randperm(sizes.vocab_size, generator=generator)
    uniform = torch.rand(num_rows, sizes.context, generator=generator)
    return order[(sizes.vocab_size**uniform).long().clamp(max=sizes.vocab_size) - 1]


class Bench:
    """All kinds of requests at one number of rows.

    Args:
        num_rows: of a step.
        sizes: the rest.
        reader: measures how fast memory is read.
        device: where logits are.
    """

    def __init__(self, num_rows: int, sizes: Sizes, reader: Reader, device: torch.device) -> None:
        self.seconds = {kind: Seconds() for kind in KINDS}
        self.top_masses: list[float] = []  # of the likeliest tokens, a value per row and round
        self._num_rows = num_rows
        self._sizes = sizes
        self._reader = reader
        self._device = device
        self._generator = torch.Generator().manual_seed(num_rows)
        ids = contexts(num_rows, sizes, self._generator)
        self._ours = {kind: Ours(params, ids) for kind, params in KINDS.items()}
        self._theirs = {
            kind: Theirs(params, ids.to(device))
            for kind, params in KINDS.items()
            if not params.frequency_penalty
        }

    def forget(self) -> None:
        """What was measured so far was for warming up."""
        self.seconds = {kind: Seconds() for kind in KINDS}

    def figures(self) -> list[Figure]:
        """One per kind."""
        return [Figure.of(kind, self._num_rows, seconds) for kind, seconds in self.seconds.items()]

    @torch.inference_mode()
    def round(self) -> None:
        """A step of each kind, by both."""
        made = peaked_logits(self._num_rows, self._sizes.vocab_size, self._generator)
        likeliest = torch.topk(made.softmax(dim=-1), _TOP).values
        self.top_masses += likeliest.sum(-1).tolist()
        logits = made.to(self._device)
        for kind, seconds in self.seconds.items():
            seconds.limit.append(logits.nbytes / self._reader.bandwidth())
            tokens = self._timed(self._ours[kind].step, logits, seconds.ours)
            if kind in self._theirs:
                self._reader.bandwidth()
                others = self._timed(self._theirs[kind].step, logits, seconds.theirs)
                assert KINDS[kind].do_sample or _agree(tokens, others), f"{kind}: other tokens"

    def _timed(
        self,
        step: Callable[[Tensor], list[tuple[int, float]]],
        logits: Tensor,
        seconds: list[float],
    ) -> list[tuple[int, float]]:
        copy = logits.clone()  # a step may write into it
        synchronise(self._device)
        started = time.perf_counter()
        tokens = step(copy)
        seconds.append(time.perf_counter() - started)
        return tokens


def _agree(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> bool:
    return all(
        a == b and abs(x - y) < _TOLERANCE for (a, x), (b, y) in zip(ours, theirs, strict=True)
    )


def report(figures: list[Figure]) -> str:
    """A table."""
    header = ["ms/step", "rows", "ours", "transformers", "times ours", "of the limit"]
    return table(header, [figure.cells() for figure in figures])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20, help="rounds")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--tiny", "--quick", action="store_true", help="only to see that everything runs"
    )
    options = parser.parse_args()
    torch.set_num_threads(num_processors())  # as the engine does
    device = torch.device(options.device)
    sizes = Sizes(
        vocab_size=options.vocab_size,
        rows=tuple(options.rows),
        read_bytes=2**30 if device.type == "cuda" else 2**28,
    )
    if options.tiny:
        sizes = Sizes(vocab_size=500, rows=(1, 3), context=20, read_bytes=2**20)
    described: dict[str, Any] = machine.describe(device)
    reader = Reader(sizes.read_bytes, device)
    benches = [Bench(num_rows, sizes, reader, device) for num_rows in sizes.rows]
    for number in tqdm(range(options.repeat + 1), desc="rounds", file=sys.stderr):
        for bench in benches:
            bench.round()
            if number == 0:
                bench.forget()
    figures = [figure for bench in benches for figure in bench.figures()]
    figures.sort(key=lambda figure: list(KINDS).index(figure.kind))
    masses = [mass for bench in benches for mass in bench.top_masses]
    print(machine.line(described))
    print(
        f"vocabulary of {sizes.vocab_size}, contexts of {sizes.context}; the {_TOP} likeliest "
        f"tokens hold {statistics.mean(masses):.1%} of a row, {min(masses):.1%} at least"
    )
    print(report(figures))
    result = {
        "machine": described,
        "vocab_size": sizes.vocab_size,
        "top_50_mass": statistics.mean(masses),
        "figures": [asdict(figure) for figure in figures],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
