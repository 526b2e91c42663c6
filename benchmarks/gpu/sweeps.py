"""Step 4: sizes of tiles, splits and chunks, and what other kernels take for the same work.

Every size in engine/kernels was chosen without a GPU. Each table varies one of them at the shape of
Llama-3.1-8B in bfloat16 and compares with the value in force; attention is compared with torch's
own variable-length attention over the same blocks where it runs, and with its dense attention.

    python -m benchmarks.gpu.sweeps

Beside the seconds stands the share of the memory's bandwidth, or of the rate of matrix products,
that was measured in the same run.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ceilings import Reader, matmul_rate
from benchmarks.gpu.adapted_layer import AdaptedLayer
from benchmarks.gpu.attention_batch import AttentionBatch, made
from benchmarks.gpu.results import Results, arguments
from benchmarks.gpu.shapes import LLAMA_8B, KernelShape, shrunk
from benchmarks.gpu.timing import median_s
from benchmarks.load import Load, generated
from benchmarks.random_engine import random_engine, release
from benchmarks.random_model import llama_8b
from benchmarks.random_model import shrunk as shrunk_config
from benchmarks.report import table
from engine.kernels.triton_attention import TritonAttention

ATTENTION_SIZES: dict[str, list[int]] = {
    "_LEAST_SPLIT": [128, 256, 512],
    "_PROGRAMS_PER_UNIT": [2, 4, 8],
    "_LEAST_PROGRAMS": [1, 4, 8],
    "_TILE_BYTES": [4096, 8192, 16_384],
    "_STAGES": [2, 3, 4, 5],
}
SAMPLING_SIZES: dict[str, list[int]] = {"_SLICE": [2048, 4096, 8192], "_BLOCK": [8192, 16_384]}
LAYER_SIZES: dict[str, list[int]] = {"_GATE_TILE": [512, 1024, 2048], "_NORM_ELEMENTS": [512, 1024]}
ADAPTER_SIZES: dict[str, list[int]] = {
    "_SPLIT": [512, 1024, 2048],
    "_DEPTH": [64, 128, 256],
    "_COLUMNS": [64, 128, 256],
}
Row = dict[str, Any]


class Site:
    """The device, its ceilings, and the shape that is tried."""

    def __init__(self, device: torch.device, is_smoke: bool, results: Results) -> None:
        self.device, self.is_smoke, self.results = device, is_smoke, results
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape: KernelShape = shrunk(LLAMA_8B) if is_smoke else LLAMA_8B
        self.context = 40 if is_smoke else 1000
        self.batches = (1, 2) if is_smoke else (1, 64, 256)
        self.bytes_per_s = Reader(2**20 if is_smoke else 2**31, device).bandwidth(10)
        size = 64 if is_smoke else 8192
        self.flop_per_s = matmul_rate([(size, size, size)], self.dtype, device)

    def seconds(self, work: Callable[[], object]) -> float:
        """The median duration of some work."""
        return median_s(work, self.device, 1 if self.is_smoke else 20)

    def decode(self, num_rows: int) -> AttentionBatch:
        """A decode step of rows with contexts around the usual one."""
        spread = [(1, self.context + row % 7) for row in range(num_rows)]
        return made(self.shape, spread, 0, (self.dtype, self.dtype), self.device)

    def prompts(self) -> AttentionBatch:
        """Prompts without a context."""
        sequences = [(48, 48)] * 2 if self.is_smoke else [(2048, 2048)] * 4
        return made(self.shape, sequences, 0, (self.dtype, self.dtype), self.device)


@contextmanager
def sized(module: ModuleType, name: str, value: int) -> Iterator[None]:
    """A module whose size of that name has another value."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def swept(
    site: Site, module: ModuleType, sizes: dict[str, list[int]], works: dict[str, Callable[[], Any]]
) -> list[Row]:
    """Seconds of each work with each value of each size; an error where a value does not run."""
    rows: list[Row] = []
    for name, values in sizes.items():
        in_force = getattr(module, name)
        tried = values[:1] if site.is_smoke else [*values, in_force]
        for value in dict.fromkeys(tried):
            for kind, work in works.items():
                row: Row = {"size": name, "value": value, "is_in_force": value == in_force}
                row["work"] = kind
                with sized(module, name, value):
                    try:
                        row["us"] = 1e6 * site.seconds(work)
                    except Exception as error:  # for example too much shared memory
                        row["error"] = f"{type(error).__name__}: {error}"[:200]
                rows.append(row)
    _print(rows, ["size", "value", "work", "us", "error"])
    return rows


def attention_sizes(site: Site) -> list[Row]:
    """Splits, tiles and stages of attention, for decoding and for prompts."""
    from engine.kernels import triton_attention

    backend = TritonAttention()
    works = {
        f"decode, {rows} rows": partial(site.decode(rows).attend, backend) for rows in site.batches
    }
    works["prompts"] = partial(site.prompts().attend, backend)
    return swept(site, triton_attention, ATTENTION_SIZES, works)


def sampling_sizes(site: Site) -> list[Row]:
    """Slices of choosing, blocks of truncating."""
    from engine.kernels import triton_sampling

    works: dict[str, Callable[[], Any]] = {}
    for rows in site.batches[::2] or site.batches:
        scores = torch.randn(rows, site.shape.vocab_size, device=site.device) * 3
        works[f"greedy, {rows} rows"] = partial(triton_sampling.choose, scores)
        for name, (top_k, top_p) in {"top-p": (1e9, 0.95), "chat": (50.0, 0.95)}.items():
            limits = scores.new_tensor([0.7, top_k, top_p, 1.0]).unsqueeze(1).repeat(1, rows)
            works[f"{name}, {rows} rows"] = partial(_truncate, scores, limits)
    return swept(site, triton_sampling, SAMPLING_SIZES, works)


def _truncate(scores: Tensor, limits: Tensor) -> None:
    from engine.kernels import triton_sampling

    triton_sampling.truncate(scores.clone(), limits)


def layer_sizes(site: Site) -> list[Row]:
    """Tiles of gates and norms."""
    from engine.kernels import triton_elementwise

    works: dict[str, Callable[[], Any]] = {}
    for rows in (1, 4) if site.is_smoke else (1, 256, 2048):
        x = torch.randn(rows, site.shape.hidden, device=site.device).to(site.dtype)
        merged = torch.randn(rows, 2 * site.shape.intermediate, device=site.device).to(site.dtype)
        norm = partial(triton_elementwise.rms_norm, weight_offset=0.0, rounds_early=True)
        works[f"norm, {rows} rows"] = partial(norm, x, x[0].clone(), 1e-5)
        works[f"gate, {rows} rows"] = partial(triton_elementwise.gated, merged, activation="silu")
    return swept(site, triton_elementwise, LAYER_SIZES, works)


def adapter_sizes(site: Site) -> list[Row]:
    """Tiles of the updates of adapters, beside those by torch and the layer's own product."""
    from engine.kernels import triton_low_rank

    shape, kv_width = site.shape, site.shape.kv_heads * site.shape.head_dim
    widths = [shape.heads * shape.head_dim, kv_width, kv_width]
    works: dict[str, Callable[[], Any]] = {}
    for count in (1, 4) if site.is_smoke else (1, 8):
        layer = AdaptedLayer(widths, shape.hidden, site.dtype, site.device, [16] * count)
        base = nn.Linear(shape.hidden, layer.width, bias=False, dtype=site.dtype).to(site.device)
        for rows in (2, 5) if site.is_smoke else (8, 64, 256, 2048):
            x = torch.randn(rows, shape.hidden, device=site.device).to(site.dtype)
            y, slots = base(x).detach(), layer.slots(rows, is_mixed=True)
            name = f"{count} adapters, {rows} rows"
            works[name] = partial(layer.updated, x, y, slots)
            works[f"{name}, torch"] = partial(layer.expected, x, y, slots)
            works[f"{name}, layer"] = partial(_each, [base], x)
    return swept(site, triton_low_rank, ADAPTER_SIZES, works)


def attention_peers(site: Site) -> list[Row]:
    """Our attention, torch's over the same blocks, and torch's dense one over copied keys."""
    rows: list[Row] = []
    batches = {f"decode, {number} rows": site.decode(number) for number in site.batches}
    batches["prompts"] = site.prompts()
    for name, batch in batches.items():
        expected = batch.attend(TritonAttention()).float()
        arms: dict[str, tuple[Callable[[], Callable[[], Tensor]], str]] = {
            "ours": (partial(partial, batch.attend, TritonAttention()), "default"),
            "varlen": (partial(_varlen, batch), "default"),
            "varlen, FA3": (partial(_varlen, batch), "FA3"),
            "dense": (partial(_dense, batch), "default"),
        }
        for arm, (make, kind) in arms.items():
            row: Row = {"work": name, "arm": arm}
            try:
                with implementation(kind):
                    work = make()
                    row["difference"] = float((work().float() - expected).abs().max())
                    seconds = site.seconds(work)
                row |= {"us": 1e6 * seconds, **_shares(site, batch, seconds)}
            except Exception as error:  # for example no flash attention in this torch
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
    _print(rows, ["work", "arm", "us", "of_bandwidth", "of_products", "difference", "error"])
    return rows


def _shares(site: Site, batch: AttentionBatch, seconds: float) -> dict[str, float]:
    """The shares of the ceilings: keys and values are read once, products are causal."""
    shape, starts = batch.shape, batch.query_start_loc.tolist()
    contexts = batch.context_lens.tolist()
    queries = [end - start for start, end in itertools.pairwise(starts)]
    pairs = sum(n * c - n * (n - 1) // 2 for n, c in zip(queries, contexts, strict=True))
    read = 2 * sum(contexts) * shape.kv_heads * shape.head_dim * batch.query.element_size()
    return {
        "of_bandwidth": read / seconds / site.bytes_per_s,
        "of_products": 4 * pairs * shape.heads * shape.head_dim / seconds / site.flop_per_s,
    }


@contextmanager
def implementation(kind: str) -> Iterator[None]:
    """Makes torch use flash attention by another implementation, where it is installed.

    Raises:
        RuntimeError: it is not.
    """
    if kind == "default":
        yield
        return
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl(kind)
    try:
        yield
    finally:
        restore_flash_attention_impl()


def _varlen(batch: AttentionBatch) -> Callable[[], Tensor]:
    """Attention of torch through the block table, whose blocks are token-major."""
    from torch.nn.attention import varlen

    key, value = (cache.nan_to_num().contiguous() for cache in batch.caches)
    query, max_k = batch.query.contiguous(), int(batch.context_lens.max())
    return partial(
        varlen.varlen_attn,
        query,
        key,
        value,
        batch.query_start_loc,
        None,
        int(batch.query_start_loc.diff().max()),
        max_k,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=batch.context_lens,
        block_table=batch.block_tables,
    )


def _dense(batch: AttentionBatch) -> Callable[[], Tensor]:
    """Attention of torch over keys and values side by side, for sequences of one length."""
    longest = int(batch.context_lens.max())
    blocks = batch.block_tables.long()
    key, value = (
        cache[blocks].flatten(1, 2)[:, :longest].transpose(1, 2).nan_to_num().contiguous()
        for cache in batch.caches
    )
    num_seqs = len(batch.context_lens)
    query = batch.query.unflatten(0, (num_seqs, -1)).transpose(1, 2)
    num_queries = query.shape[2]
    mask = None
    if num_queries == 1:  # contexts differ a little
        places = torch.arange(longest, device=query.device)
        mask = (places < batch.context_lens[:, None])[:, None, None]

    def attend() -> Tensor:
        result = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=num_queries > 1, enable_gqa=True
        )
        return result.transpose(1, 2).flatten(0, 1)

    return attend


def products(site: Site) -> list[Row]:
    """Whether query, key and value should be one product, and 8 bits be used, by rows."""
    shape, rows = site.shape, []
    hidden, kv_width = shape.hidden, shape.kv_heads * shape.head_dim
    widths = (shape.heads * shape.head_dim, kv_width, kv_width)
    with site.device:
        parts = [nn.Linear(hidden, width, bias=False, dtype=site.dtype) for width in widths]
        whole = nn.Linear(hidden, sum(widths), bias=False, dtype=site.dtype)
    for number in (1, 4) if site.is_smoke else (1, 8, 64, 256, 2048):
        x = torch.randn(number, hidden, device=site.device).to(site.dtype)
        apart = site.seconds(partial(_each, parts, x))
        together = site.seconds(partial(_each, [whole], x))
        rows.append({"rows": number, "apart_us": 1e6 * apart, "merged_us": 1e6 * together})
    _print(rows, ["rows", "apart_us", "merged_us"])
    return rows


@torch.inference_mode()
def _each(layers: list[nn.Linear], x: Tensor) -> list[Tensor]:
    return [layer(x) for layer in layers]


def residual_norms(site: Site) -> list[Row]:
    """What an addition and the norm after it take, as two kernels and as one."""
    from engine.kernels.triton_elementwise import add_rms_norm, rms_norm

    rows = []
    for number in (1, 4) if site.is_smoke else (1, 64, 256, 2048):
        x = torch.randn(number, site.shape.hidden, device=site.device).to(site.dtype)
        weight = x[0].clone()
        norm = partial(rms_norm, weight_offset=0.0, rounds_early=True)
        merged = partial(add_rms_norm, weight_offset=0.0, rounds_early=True)
        apart = site.seconds(lambda x=x, w=weight, n=norm: n(x + x, w, 1e-5))  # type: ignore[misc]
        together = site.seconds(partial(merged, x, x, weight, 1e-5))
        rows.append({"rows": number, "apart_us": 1e6 * apart, "merged_us": 1e6 * together})
    _print(rows, ["rows", "apart_us", "merged_us"])
    return rows


def chunks(site: Site) -> list[Row]:
    """Tokens per second and the gaps between tokens, by the size of chunks beside decoding."""
    config = shrunk_config(llama_8b()) if site.is_smoke else llama_8b()
    count, prompt, answer = (3, (10, 30), (4, 8)) if site.is_smoke else (64, (500, 1500), (60, 100))
    load = Load(prompt, answer, config.vocab_size)
    rows: list[Row] = []
    for step, chunk in ((64, 16), (64, 32)) if site.is_smoke else _CHUNKS:
        if site.results.left_s < _LAST_ENGINE_S:
            break
        options = {"max_step_tokens": step, "max_chunk_tokens": chunk}
        options |= {"max_total_tokens": 2048, "enable_prefix_caching": False}
        local = random_engine(config, site.device, site.dtype, **options)
        local.run(load.items(2))
        items = load.items(count)
        run = local.run(items)
        longest = sorted(step.seconds for step in run.steps)
        rows.append(
            {
                "step_tokens": step,
                "chunk_tokens": chunk,
                "tokens_per_s": generated(items) / run.seconds,
                "longest_step_ms": 1000 * longest[-1],
            }
        )
        del local, run
        release(site.device)
        site.results.note("chunks", rows)
    _print(rows, ["step_tokens", "chunk_tokens", "tokens_per_s", "longest_step_ms"])
    return rows


_LAST_ENGINE_S = 60.0  # of the time that is left, to build one more engine and run it
_CHUNKS = ((2048, 512), (2048, 1024), (2048, 2048), (8192, 1024), (8192, 8192))


def _print(rows: list[Row], columns: list[str]) -> None:
    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]

    print(table(columns, [[cell(row.get(name, "-")) for name in columns] for row in rows]))


PARTS: dict[str, Callable[[Site], list[Row]]] = {
    "adapter_sizes": adapter_sizes,
    "attention_peers": attention_peers,
    "attention_sizes": attention_sizes,
    "products": products,
    "residual_norms": residual_norms,
    "sampling_sizes": sampling_sizes,
    "layer_sizes": layer_sizes,
    "chunks": chunks,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the sweeps while there is time; the status is 1 if any fails."""
    assert __doc__ is not None
    found = arguments(__doc__, argv, only=list(PARTS))
    results = Results("sweeps", found)
    site = Site(results.device, found.smoke, results)
    results.note("ceilings", {"GB/s": site.bytes_per_s / 1e9, "TFLOP/s": site.flop_per_s / 1e12})
    results.run({name: partial(PARTS[name], site) for name in found.only})
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
