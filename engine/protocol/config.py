"""An engine's settings, and what it reports about itself once it is ready.

Settings never change: what loading a model finds out is in `EngineInfo`.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .adapters import AdapterInfo

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine process.

    Args:
        model_id: a local directory, a GGUF file, or a hub id.
        revision: the hub revision.
        dtype: "float32", "bfloat16" or "float16", to which the weights are rounded; None rounds
            nothing on a CPU, and is the checkpoint's own dtype on a GPU. GPUs compute in it, CPUs
            in float32 if they can.
        quantize: "int8", "int4", "fp8", or one of TGI's names; see `model/quantization.py`. None
            for the weights as they are.
        kv_cache_dtype: "fp8_e4m3fn", "fp8_e5m2", or None for the model's own dtype.
        device: "cuda", "cpu", or None for a GPU if there is one.
        trust_remote_code: whether code in a checkpoint may run.
        socket_path: the Unix socket on which the engine listens.
        block_size: tokens per block of the KV cache.
        max_total_tokens: the most tokens of a prompt and its continuation; None takes the model's.
        max_batch_total_tokens: tokens that the KV cache holds, in however short sequences; None
            sizes it to the memory.
        max_step_tokens: the most tokens computed in one step.
        max_chunk_tokens: of these, the most tokens of prompts in a step for which others wait,
            because they decode or because there are several callers; None chooses by the device.
        max_num_seqs: the most sequences running at the same time.
        run_ahead: whether a step is launched before the tokens of the previous one are read; None
            does so on a GPU, which would wait for the host otherwise.
        graph_sizes: batch sizes for which decode steps are recorded on a GPU; a CPU records all
            steps up to the largest of these, 64 tokens at most. Without a size above 0 no steps are
            recorded.
        speculate: the most draft tokens per sequence and step; 0 switches speculation off.
        memory_fraction: share of the device's memory that may be used, 0 … 1.
        num_threads: CPU threads of the model, in each rank; None takes all cores.
        enable_prefix_caching: whether sequences with a common prefix share blocks.
        enable_native_kernels: whether our own kernels are used: compiled C on a CPU, Triton on a
            GPU.
        enable_fused_rotation: whether attention may apply the rotary embedding to query and key.
        enable_fusion: whether fused kernels may replace norms and gated MLPs, and tables the
            computation of rotary embeddings.
        adapters: LoRA adapters, each a name, and a directory or hub id.
        adapter_directory: below it lie adapters that may be loaded while the engine runs; None if
            none may.
        max_loras: adapters on the device at a time, in one step; those that are used least recently
            give way. None takes 8, or as many as are loaded at the start.
        max_cpu_loras: adapters that can be loaded; None takes 32, or as many as at the start.
        lora_dtype: "bfloat16" or "float16", to which adapters are rounded; None rounds nothing on a
            CPU, and to the model's own dtype on a GPU.
        num_shards: the ranks among which the model is divided, each a process with a device of its
            own, or with its share of the processors.
        image_cache_bytes: of embeddings of images, which are kept for prompts with the same image.
        max_step_image_tokens: placeholders whose images a step encodes, at the least one image;
            others wait for the next step.
        watermark_gamma: the share of the vocabulary that a watermark favours, between 0 and 1.
        watermark_delta: what a watermark adds to the logits of those tokens.
    """

    model_id: str
    socket_path: Path
    revision: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    kv_cache_dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    block_size: int = 16
    max_total_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_step_tokens: int = 2048
    max_chunk_tokens: int | None = None
    max_num_seqs: int = 256
    run_ahead: bool | None = None
    graph_sizes: tuple[int, ...] = GRAPH_SIZES
    speculate: int = 0
    memory_fraction: float = 0.9
    num_threads: int | None = None
    enable_prefix_caching: bool = True
    enable_native_kernels: bool = True
    enable_fused_rotation: bool = True
    enable_fusion: bool = True
    adapters: tuple[tuple[str, str], ...] = ()
    adapter_directory: Path | None = None
    max_loras: int | None = None
    max_cpu_loras: int | None = None
    lora_dtype: str | None = None
    num_shards: int = 1
    image_cache_bytes: int = 256 * 1024**2
    max_step_image_tokens: int = 1024
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0

    def __post_init__(self) -> None:
        for name in ("block_size", "max_step_tokens", "max_num_seqs", "num_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Given: {getattr(self, name)}")
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction must be in (0, 1]. Given: {self.memory_fraction}")
        if not 0 < self.watermark_gamma < 1:
            raise ValueError(f"watermark_gamma must be in (0, 1). Given: {self.watermark_gamma}")


class RankMemory(NamedTuple):
    """What a rank keeps on its device, in bytes; an engine that is not divided is one rank."""

    weights_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine reports about itself once it is ready.

    `max_total_tokens` is the longest sequence it can hold; `max_batch_total_tokens` what its KV
    cache holds of the longest sequences; both in tokens. `adapters` are those that are loaded, of
    at most `max_adapters`, and `loads_adapters` says whether more may come. `notes` are sentences
    on what is served otherwise than the checkpoint says. `takes_images` says whether prompts may
    have images. `ranks` is what each rank keeps in memory. `instance` is another one after each
    start.
    """

    model_id: str
    model_sha: str | None
    dtype: str
    device: str
    vocab_size: int
    max_total_tokens: int
    max_batch_total_tokens: int
    block_size: int
    attention: str
    adapters: tuple[AdapterInfo, ...] = ()
    max_adapters: int = 0
    loads_adapters: bool = False
    notes: tuple[str, ...] = ()
    takes_images: bool = False
    ranks: tuple[RankMemory, ...] = ()
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the wire."""
        return asdict(self)
