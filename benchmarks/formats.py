"""The engine on the CPU against llama.cpp and OpenVINO GenAI, by the format of the weights.

All have the same random 124 M Llama, the same number of threads and the same requests of mixed
lengths; they take turns, and the best round counts. The engine is compared alone, in this process;
llama.cpp as its server with one slot per stream; OpenVINO GenAI as its continuous batching, in a
process of its own. Both are built or installed by the script, apart from this project.

    .venv/bin/python -m benchmarks.formats [--formats float32 16-bit int8 int4] [--avx2]

What is not the same: OpenVINO reads no float32 GGUF and gets float16 weights, with which it
computes in float32; its 8 and 4 bits and those of llama.cpp have a scale for 32 weights, ours
int8 for a row and int4 for 64; in int4 the output layer has 8 bits everywhere.

`--avx2` leaves AVX-512 and VNNI out of our kernels, and asks OpenVINO to do without AVX-512, too
(of its libraries only oneDNN listens, so it keeps a part of it); llama.cpp is left out then. The
last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import gguf_file, machine
from benchmarks.llama_build import PeerAbsentError, server_binary
from benchmarks.llama_server import llama_server, llama_stream
from benchmarks.load import Item, Load, generated, uniform
from benchmarks.local_engine import LocalEngine
from benchmarks.local_server import http_client
from benchmarks.openvino_peer import openvino
from benchmarks.random_model import llama_125m, save, shrunk
from benchmarks.report import last_line, table
from engine.protocol.config import EngineConfig

COUNTS = (1, 8, 32)
_NARROW = "-mno-avx512f -mno-avxvnni"  # of gcc

Arm = Callable[[list[Item]], Awaitable[tuple[float, float]]]  # seconds, and to the first token


@dataclass(frozen=True, slots=True)
class Format:
    """How each contender has the weights.

    Attributes:
        dtype: of our checkpoint.
        also: our settings of `dtype` to compare, beside none.
        quantize: what our engine makes of it.
        llama: formats of llama.cpp's files.
        openvino: its file's format, and the precisions it computes in.
    """

    dtype: torch.dtype
    quantize: str | None
    llama: Mapping[str, gguf_file.Format]
    openvino: tuple[gguf_file.Format, Sequence[str]]
    also: Sequence[str] = ()


FORMATS = {
    "float32": Format(torch.float32, None, {"F32": gguf_file.F32}, (gguf_file.F16, ["f32"])),
    "16-bit": Format(
        torch.bfloat16,
        None,
        {"BF16": gguf_file.BF16, "F16": gguf_file.F16},
        (gguf_file.F16, ["bf16", "f16"]),
        also=["bfloat16"],
    ),
    "int8": Format(torch.float32, "int8", {"Q8_0": gguf_file.Q8_0}, (gguf_file.Q8_0, ["f32"])),
    "int4": Format(torch.float32, "int4", {"Q4_0": gguf_file.Q4_0}, (gguf_file.Q4_0, ["f32"])),
}


@dataclass(slots=True)
class Contest:
    """The contenders in one format, and what they reached.

    Attributes:
        rates: tokens per second by contender and number of streams.
        first_s: seconds to the first token of a prompt of 2,048 tokens, by contender.
        absent: contenders that cannot run, with the reason.
    """

    arms: dict[str, dict[int, Arm]] = field(default_factory=dict)
    rates: dict[str, dict[int, float]] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    async def measure(self, count: int, load: Load) -> None:
        """Runs all contenders in turn on as many streams."""
        for name, by_count in self.arms.items():
            if count not in by_count:
                continue
            items = load.items(count)
            seconds, _ = await by_count[count](items)
            rates = self.rates.setdefault(name, {})
            rates[count] = max(rates.get(count, 0.0), generated(items) / seconds)

    async def measure_first(self, load: Load) -> None:
        """The first token of a lone long prompt."""
        for name, by_count in self.arms.items():
            if 1 in by_count:
                _, first = await by_count[1](load.items(1))
                self.first_s[name] = min(first, self.first_s.get(name, first))


async def contest(
    stack: AsyncExitStack,
    form: Format,
    model: Any,
    folder: Path,
    room: int,
    arguments: argparse.Namespace,
) -> Contest:
    """Starts all contenders in a format; `room` is the tokens that a stream needs."""
    avx2 = arguments.avx2
    found = Contest()
    checkpoint = folder / str(form.dtype)
    if not checkpoint.exists():
        save_as(model, checkpoint, form.dtype)
    config = EngineConfig(
        model_id=str(checkpoint),
        socket_path=folder / "unused.sock",
        device="cpu",
        quantize=form.quantize,
        enable_prefix_caching=False,
    )
    for dtype in (None, *form.also):
        engine = LocalEngine.build(replace(config, dtype=dtype))
        found.arms[f"ours, --dtype {dtype}" if dtype else "ours"] = dict.fromkeys(
            COUNTS, _ours(engine)
        )
    file, precisions = form.openvino
    for precision in precisions if "OpenVINO" not in arguments.without else ():
        try:
            arm = await _openvino(stack, _written(model, folder, file), precision, avx2)
            found.arms[f"OpenVINO {precision}"] = dict.fromkeys(COUNTS, arm)
        except PeerAbsentError as error:
            found.absent[f"OpenVINO {precision}"] = str(error)
    for name, kind in form.llama.items() if "llama.cpp" not in arguments.without else ():
        try:
            path = _written(model, folder, kind)
            found.arms[f"llama.cpp {name}"] = await _llama(stack, path, room)
        except (PeerAbsentError, RuntimeError, TimeoutError) as error:
            found.absent[f"llama.cpp {name}"] = str(error)
    return found


def save_as(model: Any, path: Path, dtype: torch.dtype) -> None:
    """Saves the model's weights in a dtype, with its tokenizer."""
    save(model.config, path)
    if dtype != torch.float32:
        with torch.inference_mode():
            type(model).from_pretrained(path, dtype=dtype).save_pretrained(path)


def _written(model: Any, folder: Path, form: gguf_file.Format) -> Path:
    path = folder / f"{form.file.name}.gguf"
    if not path.exists():
        gguf_file.write(model, path, form)
    return path


def _ours(engine: LocalEngine) -> Arm:
    async def arm(items: list[Item]) -> tuple[float, float]:
        run = engine.run(items)
        return run.seconds, min(times[0] for times in run.arrivals.values()) - run.started

    return arm


async def _openvino(stack: AsyncExitStack, path: Path, precision: str, avx2: bool) -> Arm:
    environment = {**os.environ, **({"ONEDNN_MAX_CPU_ISA": "AVX2"} if avx2 else {})}
    peer = stack.enter_context(openvino(path, precision, torch.get_num_threads(), environment))

    async def arm(items: list[Item]) -> tuple[float, float]:
        found = peer.run(items)
        return found.seconds, found.first

    return arm


async def _llama(stack: AsyncExitStack, path: Path, room: int) -> dict[int, Arm]:
    """A server for each number of streams."""
    arms: dict[int, Arm] = {}
    for count in COUNTS:
        url = await stack.enter_async_context(
            llama_server(server_binary(), path, count, room, torch.get_num_threads())
        )
        client = await stack.enter_async_context(http_client(url))

        async def arm(items: list[Item], client: Any = client) -> tuple[float, float]:
            started = time.perf_counter()
            streams = await asyncio.gather(*(llama_stream(client, item) for item in items))
            first = min(stream.arrivals[0] for stream in streams) - started
            return time.perf_counter() - started, first

        arms[count] = arm
    return arms


async def measure(arguments: argparse.Namespace) -> dict[str, Contest]:
    """All formats, one after the other."""
    contests: dict[str, Contest] = {}
    prompts, answers, long = (
        ((8, 24), (3, 9), 48) if arguments.tiny else ((32, 224), (16, 112), 2048)
    )
    with tempfile.TemporaryDirectory() as folder:
        model = save(shrunk(llama_125m()) if arguments.tiny else llama_125m(), Path(folder, "base"))
        load = Load(prompts, answers, model.config.vocab_size)
        first = uniform(long, 2, model.config.vocab_size)
        for name in arguments.formats:
            async with AsyncExitStack() as stack:
                rivals = await contest(
                    stack, FORMATS[name], model, Path(folder), long + 128, arguments
                )
                for _ in tqdm(range(arguments.repeat), desc=name, file=sys.stderr):
                    await rivals.measure_first(first)
                    for count in COUNTS:
                        await rivals.measure(count, load)
            contests[name] = rivals
    return contests


def report(contests: Mapping[str, Contest]) -> str:
    """A table of all formats: tokens per second, and ours as a multiple of each peer."""
    rows, absent = [], []
    for form, found in contests.items():
        for name, rates in found.rates.items():
            cells = _cells(rates, found.rates["ours"] if name != "ours" else {})
            rows.append([form, name, *cells, f"{found.first_s[name] * 1000:.0f}"])
        absent += [f"absent: {name}, {form}: {reason}" for name, reason in found.absent.items()]
    header = ["weights", "tokens/s (ours / it)", *map(str, COUNTS), "first token of 2,048, ms"]
    return "\n".join([table(header, rows), *absent])


def _cells(rates: Mapping[int, float], ours: Mapping[int, float]) -> list[str]:
    ratios = {count: f" ({ours[count] / rate:.2f})" for count, rate in rates.items() if ours}
    return [f"{rate:.0f}{ratios.get(count, '')}" for count, rate in rates.items()]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--repeat", type=int, default=2, help="rounds; the best counts")
    add("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    add("--without", nargs="*", default=[], choices=["OpenVINO", "llama.cpp"], help="leave out")
    add("--avx2", action="store_true", help="without AVX-512")
    add("--tiny", action="store_true", help="only to see that everything runs")
    arguments = parser.parse_args()
    if arguments.avx2:
        os.environ["CC"] = f"gcc {_NARROW}"
        arguments.without = [*arguments.without, "llama.cpp"]  # would need a build of its own
    described = machine.describe() | {"avx2": arguments.avx2}
    contests = asyncio.run(measure(arguments))
    print(f"\n{machine.line(described)}\n\n{report(contests)}\n")
    result = {
        name: {"tokens_per_second": found.rates, "first_s": found.first_s, "absent": found.absent}
        for name, found in contests.items()
    }
    print(last_line({"machine": described, "formats": result}, []))


if __name__ == "__main__":
    main()
