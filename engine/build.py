"""Puts an engine together from its configuration: the only place of this package that does."""

from __future__ import annotations

import logging

import torch
from transformers import AutoTokenizer

from . import cache_size
from .attention import AttentionBackend, ReferenceAttention
from .block_manager import BlockManager
from .config import EngineConfig, EngineInfo
from .constraints import Constraints
from .engine import Engine
from .errors import ModelLoadError
from .executor import Executor, Forward
from .grammar import GrammarCompiler, TokenMasks
from .graphs import DecodeGraphs, cuda_recorder
from .kernels import cpu as cpu_kernels
from .kernels import has_triton
from .kv_cache import KVCache, bytes_per_token
from .model_loader import (
    LoadedModel,
    backend_agrees,
    fuse_layers,
    fuse_rotation,
    load_model,
    quantize_model,
    use_angle_tables,
    warm_up,
)
from .model_runner import ModelRunner
from .quantization import multiplies_fp8
from .scheduler import Scheduler
from .taped_steps import TapedSteps
from .threads import num_processors
from .watermark import Watermark
from .worst_step import StepBounds

logger = logging.getLogger(__name__)

_DEFAULT_MAX_TOTAL_TOKENS = 4096  # TGI's bound on what it takes from the model's own
# By arithmetic, of a model of some size: ten decode steps on a CPU, five on a GPU.
_CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
_MAX_TAPED_TOKENS = 64  # in larger steps a CPU computes for ten times as long as Python takes
_MAX_LOGPROB_ROWS = 256  # in a step, of prompts; each is a vocabulary of logits
_CACHE_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}  # TGI's names


def build_engine(config: EngineConfig) -> tuple[Engine, EngineInfo]:
    """Loads the model, sizes the cache and returns an engine that is ready for requests.

    Raises:
        ModelLoadError: the model cannot be served with this configuration.
    """
    torch.set_num_threads(config.num_threads or num_processors())
    loaded = load_model(config)
    limit = _max_total_tokens(config, loaded)
    cache_dtype = _cache_dtype(config, loaded)
    backend, attention = _choose_backend(config, loaded, cache_dtype)
    if config.enable_native_kernels and config.enable_fusion:
        fuse_layers(loaded)
        use_angle_tables(loaded, limit)
    quantize_model(loaded)
    if (kernels := _native_kernels(config, loaded)) is not None:
        cpu_kernels.pack_model(loaded.model, kernels)
    if loaded.device.type == "cuda":  # kernels are compiled now, and not while someone waits
        warm_up(loaded, backend, config.block_size, cache_dtype)
    vocab_size = int(loaded.model.config.get_text_config().vocab_size)
    watermark = Watermark(
        vocab_size, loaded.device, gamma=config.watermark_gamma, delta=config.watermark_delta
    )
    bounds = _bounds(config, limit)
    runner = ModelRunner(loaded, _cache(config, loaded, cache_dtype, 1), backend)
    executor = Executor(runner.forward, loaded.device, config.block_size, watermark)
    num_blocks = cache_size.num_blocks(
        config,
        cache_size.room_for_cache(config, executor, bounds, loaded.device),
        bytes_per_token(loaded.layers, cache_dtype),
        limit,
        loaded.device,
    )
    runner.cache = _cache(config, loaded, cache_dtype, num_blocks)
    blocks = BlockManager(
        num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    scheduler = Scheduler(
        blocks,
        max_step_tokens=bounds.max_step_tokens,
        max_num_seqs=bounds.max_num_seqs,
        max_chunk_tokens=config.max_chunk_tokens or _CHUNK_TOKENS[loaded.device.type],
        max_logprob_rows=bounds.max_logprob_rows,
        max_draft_tokens=bounds.max_draft_tokens,
    )
    info = EngineInfo(
        model_id=config.model_id,
        model_sha=getattr(loaded.model.config, "_commit_hash", None),
        dtype=str(loaded.dtype),
        device=loaded.device.type,
        vocab_size=vocab_size,
        max_total_tokens=limit,
        max_batch_total_tokens=num_blocks * config.block_size,
        block_size=config.block_size,
        attention=attention,
    )
    is_gpu = loaded.device.type == "cuda"
    engine = Engine(
        _recorded(config, runner, limit, vocab_size) if is_gpu else _taped(config, runner, limit),
        scheduler,
        loaded.device,
        vocab_size=vocab_size,
        max_total_tokens=limit,
        watermark=watermark,
        constraints=_constraints(config, vocab_size),
        runs_ahead=is_gpu if config.run_ahead is None else config.run_ahead,
    )
    return engine, info


def _bounds(config: EngineConfig, max_total_tokens: int) -> StepBounds:
    return StepBounds(
        max_total_tokens=max_total_tokens,
        max_step_tokens=config.max_step_tokens,
        max_num_seqs=config.max_num_seqs,
        max_logprob_rows=_MAX_LOGPROB_ROWS,
        max_draft_tokens=config.speculate,
        block_size=config.block_size,
    )


def _cache(
    config: EngineConfig, loaded: LoadedModel, dtype: torch.dtype, num_blocks: int
) -> KVCache:
    return KVCache(loaded.layers, num_blocks, config.block_size, dtype, loaded.device)


def _recorded(
    config: EngineConfig, runner: ModelRunner, max_total_tokens: int, vocab_size: int
) -> Forward:
    """The model's forward, with decode steps recorded; only our own kernels allow that."""
    sizes = [size for size in config.graph_sizes if 0 < size <= config.max_num_seqs]
    if not sizes or isinstance(runner.backend, ReferenceAttention):
        return runner.forward
    graphs = DecodeGraphs(
        runner.forward,
        sizes,
        max_blocks=-(-max_total_tokens // config.block_size),
        vocab_size=vocab_size,
        device=runner.device,
        with_drafts=config.speculate > 0,
    )
    graphs.record(cuda_recorder(runner.device))
    return graphs


def _taped(config: EngineConfig, runner: ModelRunner, max_total_tokens: int) -> Forward:
    """The model's forward, with small steps repeated from tapes where our own kernels compute."""
    max_tokens = min(max(config.graph_sizes, default=0), _MAX_TAPED_TOKENS)
    if not max_tokens or not isinstance(runner.backend, cpu_kernels.CpuKernels):
        return runner.forward
    max_blocks = -(-max_total_tokens // config.block_size)
    taped = TapedSteps(runner.forward, runner.backend, max_tokens=max_tokens, max_blocks=max_blocks)
    taped.prove(max_total_tokens - 1, config.block_size)
    return taped


def _constraints(config: EngineConfig, vocab_size: int) -> Constraints | None:
    """Grammars need to know how tokens are spelt, which nothing else in the engine does."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_id, revision=config.revision)
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer is None or not tokenizer.is_fast:
        logger.warning("%s has no fast tokenizer: no grammars", config.model_id)
        return None
    text = tokenizer.backend_tokenizer.to_str()
    return Constraints(GrammarCompiler(text, vocab_size), TokenMasks(vocab_size))


def _cache_dtype(config: EngineConfig, loaded: LoadedModel) -> torch.dtype:
    if config.kv_cache_dtype is None:
        return loaded.dtype
    if config.kv_cache_dtype not in _CACHE_DTYPES:
        raise ModelLoadError(
            f"kv_cache_dtype must be one of {', '.join(_CACHE_DTYPES)}. "
            f"Given: {config.kv_cache_dtype}"
        )
    return _CACHE_DTYPES[config.kv_cache_dtype]


def _choose_backend(
    config: EngineConfig, loaded: LoadedModel, cache_dtype: torch.dtype
) -> tuple[AttentionBackend, str]:
    """The fastest attention that can compute this model, and its name."""
    if config.enable_native_kernels and loaded.device.type == "cuda":
        triton = _triton_attention(config, loaded, cache_dtype)
        if triton is not None:
            return triton, "Triton kernels"
    dims = {(shape.key_dim, shape.value_dim) for shape in loaded.layers.values()}
    fits = all(key == value and key % 8 == 0 and key <= 256 for key, value in dims)
    kernels = _native_kernels(config, loaded)
    if kernels is not None and fits and cache_dtype is torch.float32:
        if config.enable_fused_rotation:
            fuse_rotation(loaded, kernels)
        return kernels, "native CPU kernels"
    return ReferenceAttention(), "reference attention"


def _native_kernels(config: EngineConfig, loaded: LoadedModel) -> cpu_kernels.CpuKernels | None:
    if not config.enable_native_kernels or loaded.device.type != "cpu":
        return None
    return cpu_kernels.load() if loaded.dtype is torch.float32 else None


def _triton_attention(
    config: EngineConfig, loaded: LoadedModel, cache_dtype: torch.dtype
) -> AttentionBackend | None:
    """The GPU kernels, where Triton is installed, can compile them and they compute this model."""
    if not has_triton():
        return None
    from .kernels.triton_attention import MAX_HEAD_DIM, TritonAttention

    dims = [max(shape.key_dim, shape.value_dim) for shape in loaded.layers.values()]
    if max(dims) > MAX_HEAD_DIM:
        logger.warning("heads of %d are too wide for the GPU kernels", max(dims))
        return None
    is_gpu = loaded.device.type == "cuda"  # else Triton's interpreter, which has every format
    if is_gpu and cache_dtype is torch.float8_e4m3fn and not multiplies_fp8(loaded.device):
        logger.warning("this GPU lacks fp8_e4m3fn: attention will be slow; use fp8_e5m2")
        return None
    backend = TritonAttention()
    if not backend_agrees(loaded, backend, config.block_size, cache_dtype):
        return None
    if config.enable_fused_rotation:
        fuse_rotation(loaded, backend)
    return backend


def _max_total_tokens(config: EngineConfig, loaded: LoadedModel) -> int:
    text_config = loaded.model.config.get_text_config()
    trained = int(getattr(text_config, "max_position_embeddings", _DEFAULT_MAX_TOTAL_TOKENS))
    wanted = config.max_total_tokens or min(trained, _DEFAULT_MAX_TOTAL_TOKENS)
    if wanted > trained:
        raise ModelLoadError(
            f"max_total_tokens must be <= {trained}, the positions that {config.model_id} has. "
            f"Given: {wanted}"
        )
    return wanted
