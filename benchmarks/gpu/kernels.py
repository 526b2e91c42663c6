"""Step 1: builds every Triton kernel, and compares it with torch at the shapes of real models.

For the shapes of Llama-3.1-8B, Qwen3-0.6B, Gemma 3 4B and gpt-oss-20b, in bfloat16, float16 and
float32: attention (decoding, draft tokens, prompts, windows, sinks, 8-bit caches), writing keys and
values with and without rotation, norms, gates, choosing and truncating, rounding to 8 bits, updates
of adapters.

    python -m benchmarks.gpu.kernels

A kernel that does not compile or differs is an error of its own; the others go on. Each check has
the seconds of its first call, in which Triton compiles, and the largest difference.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.adapted_layer import AdaptedLayer
from benchmarks.gpu.attention_batch import AttentionBatch, made
from benchmarks.gpu.results import Results, arguments
from benchmarks.gpu.shapes import SHAPES, KernelShape, shrunk
from engine.attention.paged import ReferenceAttention
from engine.kernels import int8
from engine.sampling import choice, truncation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# As a share of the largest magnitude that is expected. Attention adds 1000 products in another
# order, and rounds weights to 16 bits before it multiplies them.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SEED = 1


@dataclass(frozen=True, slots=True)
class Check:
    """A kernel at one shape; `difference` is relative to the largest magnitude."""

    kernel: str
    model: str
    dtype: str
    first_call_s: float
    difference: float
    tolerance: float

    @property
    def is_right(self) -> bool:
        """Whether the difference is small; not if it is not a number."""
        return self.difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class Trial:
    """One call of a kernel and of what it is compared with."""

    kernel: str
    ours: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    tolerance: float


@dataclass(frozen=True, slots=True)
class Site:
    """Where and at which shape kernels are tried."""

    shape: KernelShape
    dtype: torch.dtype
    device: torch.device
    is_smoke: bool

    def random(self, *size: int) -> Tensor:
        """Normal numbers in this format."""
        generator = torch.Generator(self.device).manual_seed(_SEED)
        return torch.randn(size, generator=generator, device=self.device).to(self.dtype)


def attention_trials(site: Site) -> Iterator[Trial]:
    """Attention of each kind of step, and with what each kind of model has."""
    long, many = (40, 3) if site.is_smoke else (1000, 64)
    mixed = [(1, long), (3, long), (long // 2, long), (long // 3, long // 3), (1, 1)]
    kinds: dict[str, list[tuple[int, int]]] = {
        "decode, 1 row": [(1, long)],
        f"decode, {many} rows": [(1, 1 + row * long // many) for row in range(many)],
        "draft tokens": [(1 + row % 4, long + row) for row in range(4)],
        "mixed": mixed,
        "prompt": [(2 * long, 2 * long)],
    }
    cases = [
        (name, sequences, site.shape.window, site.dtype)
        for name, sequences in kinds.items()
        for window in {0, site.shape.window}
        for name in [f"{name}{', window' if window else ''}"]
    ]
    eight_bits = [torch.float8_e4m3fn, torch.float8_e5m2]
    cases += [(f"mixed, cache {str(kind)[6:]}", mixed, 0, kind) for kind in eight_bits]
    for name, sequences, window, cache_dtype in cases:
        batch = partial(made, site.shape, sequences, window, (site.dtype, cache_dtype), site.device)
        yield _attention_trial(f"attention: {name}", batch, site)


def _attention_trial(name: str, make: Callable[[], AttentionBatch], site: Site) -> Trial:
    from engine.kernels.triton_attention import TritonAttention

    return Trial(
        name,
        lambda: make().attend(TritonAttention()),
        lambda: make().attend(ReferenceAttention()),
        TOLERANCE[site.dtype],
    )


def cache_trials(site: Site) -> Iterator[Trial]:
    """Writing keys and values, and rotating before: the caches afterwards, and the query."""
    from engine.kernels.triton_attention import TritonAttention

    num_tokens, shape = 5 if site.is_smoke else 300, site.shape
    batch = partial(made, shape, [(num_tokens, num_tokens)], 0, (site.dtype,) * 2, site.device)

    def written(backend: Any) -> Tensor:
        return batch().written(backend)

    yield Trial("write_kv", lambda: written(TritonAttention()), lambda: written(_IN_TORCH), 0.0)
    yield Trial(
        "rotary_write_kv",
        lambda: batch().rotated(TritonAttention()),
        lambda: batch().rotated(None),
        TOLERANCE[site.dtype],
    )


_IN_TORCH = ReferenceAttention()


def layer_trials(site: Site) -> Iterator[Trial]:
    """Norms of rows and of heads, and the gate."""
    from engine.kernels.triton_elementwise import add_rms_norm, gated, rms_norm

    shape, tolerance = site.shape, TOLERANCE[site.dtype]
    for rows, width in ((1, shape.hidden), (300, shape.hidden), (64, shape.head_dim)):
        x, weight = site.random(rows, width), site.random(width)
        options = {"weight_offset": shape.norm_offset, "rounds_early": shape.rounds_early}
        yield Trial(
            f"rms_norm, {rows} x {width}",
            partial(rms_norm, x, weight, 1e-6, **options),  # type: ignore[arg-type]
            partial(_norm, x, weight, shape.norm_offset),
            tolerance,
        )
        yield Trial(
            f"add_rms_norm, {rows} x {width}",
            lambda x=x, w=weight, of=options: add_rms_norm(x, x, w, 1e-6, **of)[1],  # type: ignore[misc]
            partial(_norm, x + x, weight, shape.norm_offset),
            tolerance,
        )
    for rows in (1, 300):
        merged = site.random(rows, 2 * shape.intermediate)
        yield Trial(
            f"gated, {rows} rows",
            partial(gated, merged, activation=shape.activation),
            partial(_gate, merged, shape.activation),
            tolerance,
        )


def _norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    exact = x.double()
    scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)
    return scaled * (weight.double() + offset)


def _gate(merged: Tensor, activation: str) -> Tensor:
    gate, up = merged.double().chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def sampling_trials(site: Site) -> Iterator[Trial]:
    """Choosing and truncating, whose scores are always float32."""
    if site.dtype is not torch.float32:
        return
    from engine.kernels import triton_sampling

    rows = 3 if site.is_smoke else 64
    scores = site.random(rows, site.shape.vocab_size) * 3
    draws = torch.linspace(0, 0.999, rows, dtype=torch.float64, device=site.device)
    for name, drawn in (("greedy", None), ("drawn", draws)):
        yield Trial(
            f"choose, {name}",
            lambda drawn=drawn: triton_sampling.choose(scores, drawn)[1],  # type: ignore[misc]
            lambda drawn=drawn: choice.in_torch(scores, drawn).logprobs,  # type: ignore[misc]
            TOLERANCE[torch.float32],
        )
    filters = {"top-k": (50.0, 1.0, 1.0), "top-p": (1e9, 0.9, 1.0), "typical-p": (1e9, 1.0, 0.9)}
    for name, (top_k, top_p, typical_p) in filters.items():
        limits = scores.new_tensor([0.7, top_k, top_p, typical_p]).unsqueeze(1).repeat(1, rows)

        def kept(limits: Tensor = limits) -> Tensor:
            result = scores.clone()
            triton_sampling.truncate(result, limits)
            return _shares(result)

        wanted = lambda limits=limits: _shares(truncation.in_torch(scores, limits))  # noqa: E731
        yield Trial(f"truncate, {name}", kept, wanted, 1e-3)


def _shares(scores: Tensor) -> Tensor:
    """What each row's kept tokens hold: a token at the edge may fall on either side."""
    return torch.softmax(scores, -1).amax(-1)


def quantize_trials(site: Site) -> Iterator[Trial]:
    """Rounding of rows to 8 bits, and scaling of sums."""
    from engine.kernels import triton_quantize

    x = site.random(3 if site.is_smoke else 300, site.shape.hidden)
    yield Trial(
        "quantize_rows, int8",
        lambda: _product(*triton_quantize.quantize_rows(torch.int8, x)),
        lambda: _product(*int8.quantize_rows(x)),
        1e-6,
    )
    yield Trial(
        "quantize_rows, fp8",
        lambda: _product(*triton_quantize.quantize_rows(torch.float8_e4m3fn, x)),
        lambda: x.float(),
        0.14 if site.is_smoke else 0.07,  # three bits of a fraction, which the interpreter cuts off
    )
    sums = (site.random(len(x), site.shape.hidden) * 1000).int()
    scales, columns = x[:, :1].float().abs(), site.random(1, site.shape.hidden).float()
    bias = site.random(site.shape.hidden)
    yield Trial(
        "scale_sums",
        lambda: triton_quantize.scale_sums(sums, scales, columns, bias, site.dtype),
        lambda: sums.double() * (scales * columns).double() + bias,
        TOLERANCE[site.dtype],
    )


def _product(levels: Tensor, scales: Tensor) -> Tensor:
    return levels.float() * scales


def adapter_trials(site: Site) -> Iterator[Trial]:
    """Updates of query, key and value, of rows with any of four adapters and without one."""
    shape = site.shape
    kv_width = shape.kv_heads * shape.head_dim
    layer = AdaptedLayer(
        [shape.heads * shape.head_dim, kv_width, kv_width], shape.hidden, site.dtype, site.device
    )
    for rows in (1, 5) if site.is_smoke else (1, 64, 2048):
        x, y = site.random(rows, shape.hidden), site.random(rows, layer.width)
        for is_mixed in (False, True):
            slots = layer.slots(rows, is_mixed=is_mixed)
            yield Trial(
                f"low rank, {rows} rows{', some with none' if is_mixed else ''}",
                partial(layer.updated, x, y, slots),
                partial(layer.expected, x, y, slots),
                TOLERANCE[site.dtype],
            )


TRIALS = {
    "adapters": adapter_trials,
    "attention": attention_trials,
    "cache": cache_trials,
    "layers": layer_trials,
    "sampling": sampling_trials,
    "quantize": quantize_trials,
}


def check(trial: Trial, site: Site) -> Check:
    """Calls a kernel and what it is compared with."""
    started = time.perf_counter()
    actual = trial.ours()
    if site.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    expected = trial.expected().double()
    largest = float(expected.abs().max()) or 1.0
    difference = float((actual.double() - expected).abs().max()) / largest
    dtype = str(site.dtype).removeprefix("torch.")
    return Check(trial.kernel, site.shape.name, dtype, seconds, difference, trial.tolerance)


def checks(results: Results, site: Site, kind: str) -> None:
    """All trials of one kind at one site; each that fails is an error of its own."""
    found: list[dict[str, Any]] = []
    part = f"{kind}, {site.shape.name}, {str(site.dtype)[6:]}"
    for trial in TRIALS[kind](site):
        name = f"{part}: {trial.kernel}"
        try:
            done = check(trial, site)
        except Exception as error:  # for example a kernel that does not compile
            results.fail(name, f"{type(error).__name__}: {error}")
            continue
        found.append(asdict(done))
        if not done.is_right:
            results.fail(name, f"off by {done.difference:.2e} > {done.tolerance:.0e}")
    results.note(part, found)


def main(argv: list[str] | None = None) -> int:
    """Runs all checks; the status is 1 if any fails."""
    assert __doc__ is not None
    found = arguments(__doc__, argv, only=list(TRIALS))
    results = Results("kernels", found)
    is_interpreted = results.device.type == "cpu"
    # The interpreter multiplies the bits of bfloat16 numbers, and truncates where a GPU rounds.
    dtypes = (torch.float32,) if is_interpreted else DTYPES
    shapes = [shrunk(SHAPES[-1])] if found.smoke else SHAPES
    for shape in shapes:
        for dtype in dtypes:
            site = Site(shape, dtype, results.device, found.smoke)
            for kind in found.only:
                part = f"{kind}, {shape.name}, {str(dtype)[6:]}"
                if results.left_s < 0:
                    results.fail(part, "not run: no time left")
                    continue
                with results.part(part):
                    checks(results, site, kind)
    num_checks = sum(map(len, results.parts.values()))
    print(f"{num_checks} checks, {len(results.errors)} errors")
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
