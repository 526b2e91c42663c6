"""How long sampling takes in a step, by kind of request, compared with transformers.

Ours is `engine.sampling.sampler.sample` until its tokens are on the host, and appending them to
sequences that began with 1,000 tokens. The peer does what `generate` does with a batch whose rows
have the same parameters: its processors in its order, softmax, multinomial or argmax, and appending
the new tokens; then it takes the log-probability of the choice from the same softmax. It has no
frequency penalty, and its `top_n_tokens` are those of `torch.topk`. For kinds that do not draw,
both arms must choose the same tokens, or the script fails.

The logits of a model are peaked. Here they are 1.5 * log(vocabulary / rank), a Zipf law over a
permutation of the tokens, plus normal noise times 2. Each row has a permutation of its own, and
every round has new noise and permutations. The probability of the 50 likeliest tokens is printed.
Contexts are drawn from a Zipf law too, so that tokens repeat as in a text.

All kinds take turns in every round, at every number of rows; medians count. Before each step a
large buffer is read, as a forward reads its weights, so that the caches of the processor hold other
data; then the logits are written. The limit is reading the logits once at the rate of that buffer;
from a cache it can be faster.

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
from engine.protocol.processors import num_processors
from engine.protocol.request import Request, SamplingParams
from engine.sampling.sampler import sample
from engine.scheduling.sequence import Sequence

CHAT = SamplingParams(do_sample=True, temperature=0.7, top_k=50, top_p=0.95)
# In TGI a temperature or a filter switches sampling on, a penalty does not.
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
_TOP = 50  # likeliest tokens whose probability is printed
_TOLERANCE = 1e-3  # between two log-probabilities of one token


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of what is measured."""

    vocab_size: int
    rows: tuple[int, ...]
    context: int = 1000  # tokens
    read_bytes: int  # of the buffer that is read before each step


@dataclass(slots=True)
class Seconds:
    """Durations for one kind of request at one number of rows, one value per round."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Medians of all rounds; `transformers_ms` is None for what transformers does not have."""

    kind: str
    rows: int
    ours_ms: float
    transformers_ms: float | None
    ratio: float | None
    of_the_limit: float

    @classmethod
    def of(cls, kind: str, rows: int, seconds: Seconds) -> Figure:
        """Takes the medians of all rounds."""
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
        """The cells of a table row."""
        theirs = "-" if self.transformers_ms is None else f"{self.transformers_ms:.3f}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        share = f"{self.of_the_limit:.1%}"
        return [self.kind, str(self.rows), f"{self.ours_ms:.3f}", theirs, ratio, share]


class Ours:
    """The sampler of the engine, with its sequences.

    Args:
        params: parameters of all rows, which differ in their seeds only.
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
        """Samples a token for each row; returns (token id, log-probability) of each."""
        tokens = sample(logits, [*self._sequences]).wait()
        for sequence, token in zip(self._sequences, tokens, strict=True):
            sequence.append(token.token_id)
        return [(token.token_id, token.logprob) for token in tokens]


class Theirs:
    """What `generate` does between two forwards (GenerationMixin._sample of transformers 5.23).

    Args:
        params: parameters of all rows.
        contexts: int64 [num_rows, context], on the device of the logits.
    """

    def __init__(self, params: SamplingParams, contexts: Tensor) -> None:
        self._params = params
        self._ids = contexts
        self._processors = processors(params)

    def step(self, logits: Tensor) -> list[tuple[int, float]]:
        """Samples a token for each row; returns (token id, log-probability) of each."""
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
        # One copy to the host, in float32, as the engine does.
        return [(int(row[0]), row[1]) for row in torch.cat(found, dim=1).tolist()]


def processors(params: SamplingParams) -> LogitsProcessorList:
    """The processors that `generate` makes of the same parameters, in its order."""
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
    """Logits, float32 [num_rows, vocab_size], of the law that the module describes."""
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float32)
    bonus = _ZIPF * torch.log(vocab_size / ranks)
    orders = [torch.randperm(vocab_size, generator=generator) for _ in range(num_rows)]
    noise = torch.randn(num_rows, vocab_size, generator=generator) * _NOISE
    return noise + bonus[torch.stack(orders)]


def contexts(num_rows: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Token ids, int64 [num_rows, context]; the token of rank r has a probability near 1 / r."""
    order = torch.randperm(sizes.vocab_size, generator=generator)
    uniform = torch.rand(num_rows, sizes.context, generator=generator)
    return order[(sizes.vocab_size**uniform).long().clamp(max=sizes.vocab_size) - 1]


class Bench:
    """All kinds of requests at one number of rows.

    Args:
        num_rows: rows of a step.
        sizes: all other sizes.
        reader: measures how fast memory is read.
        device: the device of the logits.
    """

    def __init__(self, num_rows: int, sizes: Sizes, reader: Reader, device: torch.device) -> None:
        self.seconds = {kind: Seconds() for kind in KINDS}
        self.top_masses: list[float] = []  # probability of the likeliest tokens, per row and round
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
        """Drops the durations so far, which were for warming up."""
        self.seconds = {kind: Seconds() for kind in KINDS}

    def figures(self) -> list[Figure]:
        """One figure per kind."""
        return [Figure.of(kind, self._num_rows, seconds) for kind, seconds in self.seconds.items()]

    @torch.inference_mode()
    def round(self) -> None:
        """A step of each kind, by the engine and by transformers."""
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
        """Runs a step and appends its duration to `seconds`."""
        copy = logits.clone()  # a step may write into it
        synchronise(self._device)
        started = time.perf_counter()
        tokens = step(copy)
        seconds.append(time.perf_counter() - started)
        return tokens


def _agree(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> bool:
    """Whether both chose the same tokens, with about the same log-probabilities."""
    return all(
        a == b and abs(x - y) < _TOLERANCE for (a, x), (b, y) in zip(ours, theirs, strict=True)
    )


def report(figures: list[Figure]) -> str:
    """All figures as a table."""
    header = ["ms/step", "rows", "ours", "transformers", "times ours", "of the limit"]
    return table(header, [figure.cells() for figure in figures])


def options_from_command_line() -> argparse.Namespace:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20, help="rounds")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--tiny", "--quick", action="store_true", help="only to see that everything runs"
    )
    return parser.parse_args()


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes that the options ask for."""
    if options.tiny:
        return Sizes(vocab_size=500, rows=(1, 3), context=20, read_bytes=2**20)
    is_gpu = torch.device(options.device).type == "cuda"
    return Sizes(
        vocab_size=options.vocab_size,
        rows=tuple(options.rows),
        read_bytes=2**30 if is_gpu else 2**28,
    )


def measure(benches: list[Bench], repeat: int) -> list[Figure]:
    """Runs all rounds, after one for warming up; figures in the order of `KINDS`."""
    for number in tqdm(range(repeat + 1), desc="rounds", file=sys.stderr):
        for bench in benches:
            bench.round()
            if number == 0:
                bench.forget()
    figures = [figure for bench in benches for figure in bench.figures()]
    return sorted(figures, key=lambda figure: list(KINDS).index(figure.kind))


def main() -> None:
    """Measures and prints."""
    options = options_from_command_line()
    torch.set_num_threads(num_processors())  # as the engine does
    device, sizes = torch.device(options.device), sizes_of(options)
    described: dict[str, Any] = machine.describe(device)
    reader = Reader(sizes.read_bytes, device)
    benches = [Bench(num_rows, sizes, reader, device) for num_rows in sizes.rows]
    figures = measure(benches, options.repeat)
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
