"""Puts an engine together from its configuration: the only place of this package that does."""

from __future__ import annotations

import logging

import torch
from transformers import AutoTokenizer

from .attention.kv_cache import KVCache, bytes_per_token
from .attention.paged import ReferenceAttention
from .engine import Engine
from .executor import Executor, Forward
from .grammar.backend_llguidance import GrammarCompiler, TokenMasks
from .grammar.constraints import Constraints
from .kernels import cpu as cpu_kernels
from .memory import cache_size
from .memory.worst_step import StepBounds
from .model.loaded import LoadedModel
from .model.loading import load_model
from .model.model_runner import ModelRunner
from .model.prepare import LoadModel, prepare
from .protocol.config import EngineConfig, EngineInfo
from .replay.cpu_graphs import CpuGraphs
from .replay.cuda_graphs import DecodeGraphs, cuda_recorder
from .sampling.watermark import Watermark
from .scheduling.block_manager import BlockManager
from .scheduling.scheduler import Scheduler
from .threads import num_processors

logger = logging.getLogger(__name__)

# By arithmetic, of a model of some size: ten decode steps on a CPU, five on a GPU.
_CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
_MAX_CPU_GRAPH_TOKENS = 64  # in larger steps a CPU computes for ten times as long as Python takes
_MAX_LOGPROB_ROWS = 256  # in a step, of prompts; each is a vocabulary of logits


def build_engine(config: EngineConfig, load: LoadModel = load_model) -> tuple[Engine, EngineInfo]:
    """Loads the model, sizes the cache and returns an engine that is ready for requests.

    Args:
        config: the engine's configuration.
        load: where the model comes from.

    Raises:
        ModelLoadError: the model cannot be served with this configuration.
    """
    torch.set_num_threads(config.num_threads or num_processors())
    model = prepare(config, load)
    loaded, limit, cache_dtype = model.loaded, model.max_total_tokens, model.cache_dtype
    vocab_size = int(loaded.model.config.get_text_config().vocab_size)
    watermark = Watermark(
        vocab_size, loaded.device, gamma=config.watermark_gamma, delta=config.watermark_delta
    )
    bounds = _bounds(config, limit)
    runner = ModelRunner(loaded, _cache(config, loaded, cache_dtype, 1), model.backend)
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
        attention=model.attention,
    )
    is_gpu = loaded.device.type == "cuda"
    engine = Engine(
        _with_cuda_graphs(config, runner, limit, vocab_size)
        if is_gpu
        else _with_cpu_graphs(config, runner, limit),
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


def _with_cuda_graphs(
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


def _with_cpu_graphs(config: EngineConfig, runner: ModelRunner, max_total_tokens: int) -> Forward:
    """The model's forward, with small steps repeated from graphs where our own kernels compute."""
    max_tokens = min(max(config.graph_sizes, default=0), _MAX_CPU_GRAPH_TOKENS)
    if not max_tokens or not isinstance(runner.backend, cpu_kernels.CpuKernels):
        return runner.forward
    max_blocks = -(-max_total_tokens // config.block_size)
    graphed = CpuGraphs(
        runner.forward, runner.backend, max_tokens=max_tokens, max_blocks=max_blocks
    )
    graphed.prove(max_total_tokens - 1, config.block_size)
    return graphed


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
