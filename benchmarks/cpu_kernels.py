"""Micro-benchmark of the CPU kernels against torch, next to the measured ceilings of the machine.

Contenders take turns in one process and the best of several runs counts, so ratios are meaningful,
times less so. Prints tables; the last line is one JSON document. Run from the repository root:

    python -m benchmarks.cpu_kernels [--quick] [--threads N] [--budget SECONDS]
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu import CpuKernels, load
from engine.kernels.int8 import pack_int8, quantize_rows
from engine.kernels.packed_linear import PackedLinear
from engine.sampling.choice import in_torch

BLOCK_SIZE = 16
LINEAR_SHAPES = ((768, 768), (768, 2048), (2048, 2048), (4096, 8192), (8192, 4096))
LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
DECODE = ((1, 512), (1, 8192), (8, 512), (32, 512), (32, 2048))  # sequences, context of each
PREFILL = (128, 512, 2048)  # tokens of a prompt
INT8_ROWS = (1, 8, 32, 128, 512)
SCORES = (32_000, 128_256)  # sizes of vocabularies


class Heads(NamedTuple):
    """The attention heads of a model."""

    label: str
    num_heads: int
    num_kv_heads: int
    head_size: int


MODELS = (
    Heads("125M", 12, 4, 64),
    Heads("1B", 32, 8, 64),
    Heads("8B", 32, 8, 128),
    Heads("MHA", 16, 16, 64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """A step of equal sequences.

    Attributes:
        heads: of the model.
        seqs: number of sequences.
        queries: query tokens of each sequence, the last ones of its context.
        context: key tokens of each sequence.
    """

    heads: Heads
    seqs: int
    queries: int
    context: int

    @property
    def name(self) -> str:
        """For tables."""
        kind = "decode" if self.queries == 1 else "prefill"
        return f"{kind} {self.heads.label} seqs={self.seqs} context={self.context}"

    @property
    def flops(self) -> int:
        """Floating-point operations: two products for each visible pair of query and key."""
        pairs = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return 4 * self.seqs * self.heads.num_heads * self.heads.head_size * pairs

    @property
    def num_bytes(self) -> int:
        """Bytes of the float32 keys and values."""
        return 8 * self.seqs * self.context * self.heads.num_kv_heads * self.heads.head_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The time of one contender in one case, and the rates that follow from it."""

    case: str
    name: str
    seconds: float
    gbytes_per_s: float
    gflops: float
    note: str = ""


def best_times(contenders: Mapping[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Seconds of the fastest run of each contender; they take turns until the budget is spent."""
    best = dict.fromkeys(contenders, float("inf"))
    for function in contenders.values():
        function()
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < 4 or time.perf_counter() < end:
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return best


def ceilings(budget: float) -> dict[str, float]:
    """Memory read bandwidth (GB/s) and matrix product rate (GFLOP/s)."""
    big = torch.ones(2**27)
    square = torch.randn(2048, 2048)
    times = best_times({"read": big.sum, "gemm": lambda: square @ square}, budget)
    return {
        "read_gbytes_per_s": big.nbytes / times["read"] / 1e9,
        "gemm_gflops": 2 * 2048**3 / times["gemm"] / 1e9,
    }


def linear_contenders(
    kernels: CpuKernels, weight: Tensor, x: Tensor
) -> dict[str, Callable[[], object]]:
    """The packed layer, torch's layer, and those prepacked layers of torch that work here."""
    out_features = weight.shape[0]
    packed = kernels.pack_weight(weight)
    contenders: dict[str, Callable[[], object]] = {
        "packed": lambda: kernels.linear(x, packed, None, out_features),
        "torch": lambda: F.linear(x, weight),
    }
    with suppress(RuntimeError, AttributeError):
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, x.shape[0])
        contenders["mkl"] = lambda: torch.ops.mkl._mkl_linear(x, mkl, weight, None, x.shape[0])
    with suppress(RuntimeError, AttributeError):
        dnn = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        contenders["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(
            x, dnn, None, "none", [], ""
        )
    for name in list(contenders):
        try:
            contenders[name]()
        except RuntimeError:
            del contenders[name]
    return contenders


def bench_linear(kernels: CpuKernels, budget: float, quick: bool) -> Iterator[Result]:
    """Float32 linear layers of all shapes and batch sizes."""
    for in_features, out_features in LINEAR_SHAPES[2:4] if quick else LINEAR_SHAPES:
        weight = torch.randn(out_features, in_features)
        for rows in LINEAR_ROWS:
            x = torch.randn(rows, in_features)
            flops = 2 * rows * in_features * out_features
            moved = weight.nbytes + 4 * rows * (in_features + out_features)
            times = best_times(linear_contenders(kernels, weight, x), budget)
            for name, seconds in times.items():
                yield Result(
                    case=f"linear {in_features}x{out_features} M={rows}",
                    name=name,
                    seconds=seconds,
                    gbytes_per_s=moved / seconds / 1e9,
                    gflops=flops / seconds / 1e9,
                )


def bench_int8(kernels: CpuKernels, budget: float, read: float, quick: bool) -> Iterator[Result]:
    """8-bit layers against packed fp32 layers; `read` is the rate of memory in GB/s."""
    for in_features, out_features in LINEAR_SHAPES[1:4] if quick else LINEAR_SHAPES:
        weight = torch.randn(out_features, in_features)
        packed, rounded = kernels.pack_weight(weight), pack_int8(weight, None, kernels)
        columns = quantize_rows(weight)[0].t()
        for rows in INT8_ROWS:
            x = torch.randn(rows, in_features)
            levels = quantize_rows(x)[0]
            times = best_times(
                {
                    "packed fp32": partial(kernels.linear, x, packed, None, out_features),
                    "packed int8": partial(kernels.int8_linear, x, rounded, out_features),
                    "torch._int_mm alone": partial(torch._int_mm, levels, columns),
                },
                budget,
            )
            for name, seconds in times.items():
                weight_bytes = weight.nbytes if name == "packed fp32" else weight.numel()
                rate = (weight_bytes + 4 * rows * (in_features + out_features)) / seconds / 1e9
                ratio = times["packed fp32"] / seconds
                yield Result(
                    case=f"int8 {in_features}x{out_features} M={rows}",
                    name=name,
                    seconds=seconds,
                    gbytes_per_s=rate,
                    gflops=2 * rows * in_features * out_features / seconds / 1e9,
                    note=f"{ratio:.2f} x fp32, {rate / read:.0%} of memory's rate",
                )


def bench_choice(kernels: CpuKernels, budget: float) -> Iterator[Result]:
    """The choice of tokens and their log-probabilities: in one pass, and as operations of torch."""
    for width in SCORES:
        for rows in (1, 8, 32):
            scores = torch.randn(rows, width) * 4
            contenders: dict[str, Callable[[], object]] = {
                "choose": partial(kernels.choose, scores),
                "choose, drawn": partial(kernels.choose, scores, torch.rand(rows).double()),
                "torch": partial(in_torch, scores),
            }
            for name, seconds in best_times(contenders, budget).items():
                yield Result(
                    case=f"scores {rows}x{width}",
                    name=name,
                    seconds=seconds,
                    gbytes_per_s=scores.nbytes / seconds / 1e9,
                    gflops=0,
                )


def attention_contenders(
    kernels: CpuKernels, case: AttentionCase
) -> dict[str, Callable[[], object]]:
    """Both layouts of the paged cache, and torch's SDPA: after a gather, and on dense tensors."""
    _, num_heads, num_kv_heads, head_size = case.heads
    per_seq = -(-case.context // BLOCK_SIZE)
    num_blocks = case.seqs * per_seq
    tables = torch.randperm(num_blocks).int().view(case.seqs, per_seq)
    starts = (torch.arange(case.seqs + 1) * case.queries).int()
    lens = torch.full((case.seqs,), case.context).int()
    query = torch.randn(case.seqs * case.queries, num_heads, head_size)
    token_major = torch.randn(2, num_blocks, BLOCK_SIZE, num_kv_heads, head_size)
    head_major = token_major.transpose(2, 3).contiguous().transpose(2, 3)

    def native(cache: Tensor) -> Tensor:
        key, value = cache
        return kernels.paged_attention(query, key, value, tables, starts, lens, head_size**-0.5)

    def gather() -> tuple[Tensor, Tensor]:
        gathered = token_major[:, tables.long()].flatten(2, 3)[:, :, : case.context]
        key, value = gathered.transpose(2, 3)  # [seqs, num_kv_heads, context, head_size]
        return key, value

    def sdpa(key: Tensor, value: Tensor) -> Tensor:
        rows = query.view(case.seqs, case.queries, num_heads, head_size).transpose(1, 2)
        return F.scaled_dot_product_attention(
            rows, key, value, is_causal=case.queries > 1, enable_gqa=True
        )

    dense = tuple(part.contiguous() for part in gather())
    return {
        "native head-major": lambda: native(head_major),
        "native token-major": lambda: native(token_major),
        "gather + sdpa": lambda: sdpa(*gather()),
        "dense sdpa": lambda: sdpa(*dense),
    }


def bench_attention(kernels: CpuKernels, budget: float, case: AttentionCase) -> Iterator[Result]:
    """Paged attention against torch."""
    for name, seconds in best_times(attention_contenders(kernels, case), budget).items():
        yield Result(
            case=case.name,
            name=name,
            seconds=seconds,
            gbytes_per_s=case.num_bytes / seconds / 1e9,
            gflops=case.flops / seconds / 1e9,
        )


def bench_overhead(kernels: CpuKernels, budget: float) -> Iterator[Result]:
    """The cost of calls that compute almost nothing."""
    layer = PackedLinear.from_linear(torch.nn.Linear(16, 16, bias=False), kernels)
    x = torch.randn(1, 16)
    weight = torch.randn(16, 16)
    query, row = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    cache = torch.randn(2, 1, BLOCK_SIZE, 1, 16)
    zero, starts, one = torch.zeros(1, 1).int(), torch.tensor([0, 1]).int(), torch.ones(1).int()
    slots = torch.zeros(1).long()
    contenders: dict[str, Callable[[], object]] = {
        "packed linear": lambda: layer(x),
        "torch linear": lambda: F.linear(x, weight),
        "write_kv": lambda: kernels.write_kv(row, row, cache[0], cache[1], slots),
        "attention": lambda: kernels.paged_attention(
            query, cache[0], cache[1], zero, starts, one, 1.0
        ),
    }
    for name, seconds in best_times(contenders, budget).items():
        yield Result(case="overhead", name=name, seconds=seconds, gbytes_per_s=0, gflops=0)


def bench_rowwise(kernels: CpuKernels, budget: float) -> Iterator[Result]:
    """Normalisation and gating against the operations of torch that models use for them."""
    for rows in (1, 32, 512):
        x, weight = torch.randn(rows, 768), torch.randn(768)
        both = torch.randn(rows, 2 * 2048)
        gate, up = both.chunk(2, dim=-1)

        def torch_norm(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

        def torch_gate(gate: Tensor = gate, up: Tensor = up) -> Tensor:
            return F.silu(gate) * up

        contenders: dict[str, Callable[[], object]] = {
            "rms_norm": partial(kernels.rms_norm, x, weight, 1e-6),
            "torch rms_norm": torch_norm,
            "silu_and_mul": partial(kernels.silu_and_mul, gate, up),
            "torch silu * up": torch_gate,
        }
        for name, seconds in best_times(contenders, budget).items():
            case = f"row-wise rows={rows}"
            yield Result(case=case, name=name, seconds=seconds, gbytes_per_s=0, gflops=0)


def collect(kernels: CpuKernels, budget: float, read: float, quick: bool) -> Iterator[Result]:
    """All cases in the order of printing; `read` is the rate of memory in GB/s."""
    yield from bench_overhead(kernels, budget)
    yield from bench_rowwise(kernels, budget)
    yield from bench_choice(kernels, budget)
    yield from bench_linear(kernels, budget, quick)
    yield from bench_int8(kernels, budget, read, quick)
    for heads in MODELS[:1] if quick else MODELS:
        for seqs, context in DECODE:
            case = AttentionCase(heads=heads, seqs=seqs, queries=1, context=context)
            yield from bench_attention(kernels, budget, case)
        for length in PREFILL:
            case = AttentionCase(heads=heads, seqs=1, queries=length, context=length)
            yield from bench_attention(kernels, budget, case)


def print_result(result: Result, is_new_case: bool) -> None:
    """Prints a line, below the name of its case if that is new."""
    if is_new_case:
        print(result.case)
    print(
        f"    {result.name:<20} {result.seconds * 1e3:10.4f} ms "
        f"{result.gbytes_per_s:8.2f} GB/s {result.gflops:8.1f} GFLOP/s "
        f"{result.note}",
        flush=True,
    )


def main() -> None:
    """Measures, prints each result at once, and ends with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--budget", type=float, default=0.4, help="seconds per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = load()
    if kernels is None:
        raise SystemExit("no native kernels here")
    results: list[Result] = []
    with torch.inference_mode():
        limits = ceilings(3.0)
        print(f"threads {torch.get_num_threads()}, {limits}")
        for result in collect(kernels, options.budget, limits["read_gbytes_per_s"], options.quick):
            print_result(result, not results or results[-1].case != result.case)
            results.append(result)
    print(json.dumps({"ceilings": limits, "results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
