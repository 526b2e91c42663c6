"""What grammars cost, for requests that have one and for other requests.

On the bundled model; whatever is compared is measured in one run and in turns:

* the time between tokens of 32 streams: alone, beside callers that keep sending ordinary grammars,
  and beside the same number of callers that send poison, grammars made to be costly;
* a step of 1, 32 and 128 rows with a grammar, the same without, and filling the masks alone;
* the time from a grammar to its first mask;
* how many tokens of usual answers their grammar forces, which need no forward.

Run it on a quiet machine:

    .venv/bin/python -m benchmarks.grammar

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import llguidance
import torch
from tqdm import tqdm

from benchmarks.local_server import METHOD, server
from engine.build import build_engine
from engine.engine import Engine
from engine.grammar.backend_llguidance import json_source, regex_source
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import TokenMasks
from engine.grammar.matcher import Matcher
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request, SamplingParams
from service.openai.tools import Tool, Toolbox
from service.pb.google.protobuf import Value
from service.pb.tokenwire.v1 import GenerateParameters, GenerateRequest, Grammar, GrammarType
from service.text.tokenizer import TextTokenizer

MODEL = Path(__file__).parents[1] / "models" / "demo"
GENERATE = METHOD.removesuffix("Stream")
NUM_STREAMS = 32
ROWS = (1, 32, 128)
PROMPT = "What is Deep Learning?"
EOS = frozenset({2})  # the bundled model's

# All allowed tokens are equally likely, so that texts differ and do not end soon.
WILD = SamplingParams(do_sample=True, temperature=1e6)
ENDLESS = json_source({"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 9999})
RECORD = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 20},
        "last_name": {"type": "string", "maxLength": 20},
        "favourite_animal": {"enum": ["cat", "crow", "cow"]},
        "is_member": {"type": "boolean"},
        "number_of_visits": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["first_name", "last_name", "favourite_animal", "is_member", "number_of_visits"],
    "additionalProperties": False,
}
WEATHER = Tool(
    name="get_weather",
    description="Get the current weather in a location",
    parameters={"properties": {"location": {"type": "string"}}, "required": ["location"]},
)
TREE = {
    "$defs": {"Node": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
        },
        "required": ["name", "children"],
    }},
    "$ref": "#/$defs/Node",
}  # fmt: skip
WIDE = {
    "type": "object",
    "properties": {f"key_{i}": {"enum": [f"v{j}" for j in range(20)]} for i in range(100)},
}
SOURCES: dict[str, str] = {
    "date, regex": regex_source("[0-9]{4}-[01][0-9]-[0-3][0-9]"),
    "record": json_source(RECORD),
    "any object": json_source({"type": "object"}),
    "tree": json_source(TREE),
    "100 keys of 20 values": json_source(WIDE),
    "tool call": json_source(Toolbox(tools=(WEATHER,), may_answer=False).schema()),
    "tool call or text": json_source(
        Toolbox(tools=(WEATHER,), may_answer=False).schema(), or_text=True
    ),
}


def poison() -> Iterator[tuple[GrammarType, str]]:
    """Grammars made to be costly, all different, so that no cache of refusals helps."""
    for number in itertools.count():
        # Takes much longer to compile than the deadline, with growing memory.
        yield GrammarType.json, json.dumps({"type": "integer", "multipleOf": 9999991 - 2 * number})
        # A very long text without a choice, which is refused.
        yield GrammarType.regex, f"a{{{100_000 + number}}}"
        # The longest of this kind that are accepted.
        yield GrammarType.regex, f"a{{{1_000 + number}}}[bc]"
        # Takes about a second to compile, and is accepted.
        yield GrammarType.json, json.dumps({"type": "integer", "multipleOf": 60_001 + 2 * number})
        # Large, and accepted.
        keys = {f"key_{number}_{i}": {"enum": list(range(20))} for i in range(200)}
        yield GrammarType.json, json.dumps({"type": "object", "properties": keys})


def ordinary() -> Iterator[tuple[GrammarType, str]]:
    """Usual grammars, all different."""
    for number in itertools.count():
        record = {**RECORD, "title": f"Record {number}"}
        yield GrammarType.json, json.dumps(record)


class Streams:
    """Streams over gRPC, and callers that send grammars at the same time."""

    def __init__(self, address: str, new_tokens: int) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._new_tokens = new_tokens
        self._grammars = {"ordinary": ordinary(), "poisoned": poison()}
        self.outcomes: dict[str, dict[str, int]] = {arm: {} for arm in self._grammars}

    async def gaps(self, arm: str, num_senders: int = 0) -> list[float]:
        """Milliseconds between the tokens of all streams, while `num_senders` send grammars."""
        senders = [asyncio.create_task(self._send(arm)) for _ in range(num_senders)]
        if senders:
            await asyncio.sleep(1.0)  # so that the grammars have begun to cost
        found = await asyncio.gather(*(self._stream(seed) for seed in range(NUM_STREAMS)))
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
        return [gap for gaps in found for gap in gaps]

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def _stream(self, seed: int) -> list[float]:
        """Milliseconds between the tokens of one stream."""
        parameters = GenerateParameters(
            do_sample=True, temperature=1e6, seed=seed, max_new_tokens=self._new_tokens
        )
        call = self._channel.unary_stream(METHOD, None, None)(
            bytes(GenerateRequest(inputs=PROMPT, parameters=parameters))
        )
        times = [time.perf_counter() async for _ in call]
        return [(b - a) * 1000 for a, b in itertools.pairwise(times)]

    async def _send(self, arm: str) -> None:
        """Sends one grammar after the other and counts the statuses, until it is cancelled."""
        outcomes = self.outcomes[arm]
        while True:
            kind, text = next(self._grammars[arm])
            grammar = Grammar(type=kind, value=Value(string_value=text))
            parameters = GenerateParameters(grammar=grammar, max_new_tokens=50)
            request = GenerateRequest(inputs=PROMPT, parameters=parameters)
            try:
                await self._channel.unary_unary(GENERATE, None, None)(bytes(request))
                outcome = "OK"
            except grpc.aio.AioRpcError as error:
                outcome = error.code().name
            outcomes[outcome] = outcomes.get(outcome, 0) + 1


async def disturbance(arguments: argparse.Namespace) -> dict[str, Any]:
    """The time between tokens: alone, beside ordinary grammars, beside as much poison."""
    gaps: dict[str, list[float]] = {"alone": [], "ordinary": [], "poisoned": []}
    async with server(MODEL) as (_, address):
        streams = Streams(address, arguments.new_tokens)
        await streams.gaps("alone")  # warms up
        for _ in tqdm(range(arguments.repeat), desc="streams", file=sys.stderr):
            gaps["alone"] += await streams.gaps("alone")
            for arm in ("ordinary", "poisoned"):
                gaps[arm] += await streams.gaps(arm, arguments.senders)
        await streams.close()
    result = {arm: quantiles(values) for arm, values in gaps.items()}
    return {"inter_token_ms": result, "outcomes": streams.outcomes}


def quantiles(values: list[float]) -> dict[str, float]:
    """The median, the 99th percentile and the maximum."""
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(values)}


class Rows:
    """Runs steps of an engine in this process."""

    def __init__(self, num_threads: int) -> None:
        config = EngineConfig(
            model_id=str(MODEL), socket_path=MODEL / "unused.sock", num_threads=num_threads
        )
        self.engine: Engine = build_engine(config)[0]
        self._ids = itertools.count()
        self._prompt = tuple(asyncio.run(TextTokenizer.load(str(MODEL)).encode(PROMPT)))

    def request(self, source: str, number: int = 0) -> Request:
        """A request for 100 tokens of a grammar; an empty source means none."""
        return Request(
            request_id=f"{next(self._ids)}",
            prompt_token_ids=self._prompt,
            max_new_tokens=100,
            sampling=replace(WILD, seed=number),
            grammar=source,
            eos_token_ids=EOS if source else frozenset(),
        )

    def step_ms(self, sources: list[str], num_steps: int) -> float:
        """The median of decode steps with one row for each source."""
        requests = [self.request(source, number) for number, source in enumerate(sources)]
        for request in requests:
            refused = self.engine.add(request)
            assert refused is None, refused
        self.engine.step()  # the prompts
        durations = [self.engine.step().duration_s for _ in range(num_steps)]
        for request in requests:
            self.engine.abort(request.request_id)
        return statistics.median(durations) * 1000

    def forced(self, source: str) -> dict[str, int]:
        """Of a greedy answer: its tokens, and the steps that they took."""
        request = replace(self.request(source), sampling=SamplingParams())
        refused = self.engine.add(request)
        assert refused is None, refused
        num_tokens = num_steps = 0
        while self.engine.has_work:
            outputs = self.engine.step().outputs
            num_tokens += sum(output.token is not None for output in outputs)
            num_steps += 1
        return {"tokens": num_tokens, "steps": num_steps}


def steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps with and without grammars, and what the grammars force."""
    rows = Rows(arguments.num_threads)
    times: dict[int, dict[str, list[float]]] = {}
    masks = MaskTimer()
    for _ in tqdm(range(arguments.repeat), desc="steps", file=sys.stderr):
        for count in ROWS:
            arms = times.setdefault(count, {"free": [], "constrained": [], "half": [], "masks": []})
            half = count // 2
            arms["free"].append(rows.step_ms([""] * count, arguments.steps))
            arms["constrained"].append(rows.step_ms([ENDLESS] * count, arguments.steps))
            mixed = [ENDLESS] * (count - half) + [""] * half
            arms["half"].append(rows.step_ms(mixed, arguments.steps))
            arms["masks"].append(masks.fill_ms(count, arguments.steps))
    best = {
        count: {arm: min(values) for arm, values in arms.items()} for count, arms in times.items()
    }
    for count, arms in best.items():
        arms["mask_us_per_token"] = arms["masks"] * 1000 / count
    forced = {name: rows.forced(SOURCES[name]) for name in ("record", "tool call", "date, regex")}
    return {"step_ms": best, "forced": forced}


class MaskTimer:
    """Compiles grammars and fills masks without a model."""

    def __init__(self) -> None:
        self.vocab_size = int(json.loads((MODEL / "config.json").read_text())["vocab_size"])
        self.tokenizer = TextTokenizer.load(str(MODEL)).to_json()
        self.masks = TokenMasks(self.vocab_size)
        self._compiler = self.new_compiler()

    def new_compiler(self) -> GrammarCompiler:
        """A compiler that has compiled only a trivial grammar."""
        compiler = GrammarCompiler(self.tokenizer, self.vocab_size)
        compiler.compile(regex_source("a"), EOS)
        return compiler

    def fill_ms(self, count: int, num_steps: int) -> float:
        """The median milliseconds to fill the masks of `count` rows in different states."""
        matchers = [self._compiler.compile(ENDLESS, EOS) for _ in range(count)]
        durations = []
        for step in range(num_steps):
            started = time.perf_counter()
            words = self.masks.start(matchers).result()
            durations.append(time.perf_counter() - started)
            for row, matcher in enumerate(matchers):
                _advance(matcher, words[row], step + row)
        return statistics.median(durations) * 1000

    def first_mask_ms(self, source: str) -> dict[str, float]:
        """Milliseconds to compile a source, and to fill its first mask."""
        compiler = self.new_compiler()
        started = time.perf_counter()
        matcher = compiler.compile(source, EOS)
        compiled = time.perf_counter()
        self.masks.start([matcher]).result()
        filled = time.perf_counter()
        return {"compile": (compiled - started) * 1000, "mask": (filled - compiled) * 1000}


def _advance(matcher: Matcher, words: Any, number: int) -> None:
    """Advances a matcher by one of the allowed tokens.

    Args:
        matcher: the state of a grammar.
        words: its mask, 32 tokens per word.
        number: chooses the token.
    """
    allowed = [
        32 * at + bit for at in words.nonzero()[0] for bit in range(32) if words[at] >> bit & 1
    ]
    matcher.advance([allowed[number * 7919 % len(allowed)]])


def first_masks(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds from each source to its first mask; the best of several runs."""
    timer = MaskTimer()
    result = {}
    for name, source in SOURCES.items():
        found = [timer.first_mask_ms(source) for _ in range(arguments.repeat + 2)]
        result[name] = min(found, key=lambda item: sum(item.values()))
    return result


def report(result: dict[str, Any]) -> None:
    """Prints tables, and the JSON line."""
    print(f"\n{f'ms between tokens, {NUM_STREAMS} streams':34}{'p50':>10}{'p99':>10}{'max':>10}")
    for arm, values in result["inter_token_ms"].items():
        print(f"{arm:34}" + "".join(f"{values[key]:10.2f}" for key in ("p50", "p99", "max")))
    print(f"answers: {result['outcomes']}")
    print(
        f"\n{'ms per step':34}" + "".join(f"{f'{count} rows':>12}" for count in result["step_ms"])
    )
    for arm in ("free", "constrained", "half", "masks", "mask_us_per_token"):
        cells = "".join(f"{arms[arm]:12.2f}" for arms in result["step_ms"].values())
        print(f"{arm:34}{cells}")
    print(f"\n{'ms to the first mask':34}{'compile':>10}{'mask':>10}")
    for name, values in result["first_mask_ms"].items():
        print(f"{name:34}{values['compile']:10.2f}{values['mask']:10.2f}")
    print(f"\n{'greedy answers':34}{'tokens':>10}{'steps':>10}{'saved':>10}")
    for name, values in result["forced"].items():
        saved = 1 - values["steps"] / values["tokens"]
        print(f"{name:34}{values['tokens']:10}{values['steps']:10}{saved:10.0%}")
    print()
    print(json.dumps(result))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--senders", type=int, default=4, help="callers that send grammars")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["TOKENWIRE_NUM_THREADS"] = str(arguments.num_threads)  # the server's
    result = {
        **asyncio.run(disturbance(arguments)),
        **steps(arguments),
        "first_mask_ms": first_masks(arguments),
        "machine": {
            "cpu_threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "llguidance": llguidance.__version__,
        },
    }
    report(result)


if __name__ == "__main__":
    main()
