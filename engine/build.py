"""Puts an engine together from its configuration: the only place of this package that does."""

from __future__ import annotations

import logging

import torch
from transformers import AutoTokenizer

from .attention import AttentionBackend, ReferenceAttention
from .block_manager import BlockManager
from .config import EngineConfig, EngineInfo
from .constraints import Constraints
from .engine import Engine
from .errors import ModelLoadError
from .grammar import GrammarCompiler, TokenMasks
from .kernels import cpu as cpu_kernels
from .kv_cache import KVCache, bytes_per_token, free_memory
from .model_loader import LoadedModel, load_model
from .model_runner import ModelRunner
from .scheduler import Scheduler
from .threads import num_processors
from .watermark import Watermark

logger = logging.getLogger(__name__)

_DEFAULT_MAX_TOTAL_TOKENS = 4096  # TGI's bound on what it takes from the model's own
_CPU_CACHE_TOKENS = 16_384  # on the CPU, unless told otherwise: TGI's floor of 16,000, in blocks
_CPU_CACHE_FRACTION = 0.5  # … but never more of the free memory than this


def build_engine(config: EngineConfig) -> tuple[Engine, EngineInfo]:
    """Loads the model, sizes the cache and returns an engine that is ready for requests.

    Raises:
        ModelLoadError: the model cannot be served with this configuration.
    """
    torch.set_num_threads(config.num_threads or num_processors())
    loaded = load_model(config)
    backend, attention = _choose_backend(config, loaded)
    limit = _max_total_tokens(config, loaded)
    num_blocks = _num_blocks(config, loaded, limit)
    cache = KVCache(loaded.layers, num_blocks, config.block_size, loaded.dtype, loaded.device)
    runner = ModelRunner(loaded, cache, backend)
    blocks = BlockManager(
        num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    scheduler = Scheduler(
        blocks,
        max_step_tokens=config.max_step_tokens,
        max_num_seqs=config.max_num_seqs,
        max_draft_tokens=config.speculate,
    )
    info = EngineInfo(
        model_id=config.model_id,
        model_sha=getattr(loaded.model.config, "_commit_hash", None),
        dtype=str(loaded.dtype),
        device=loaded.device.type,
        vocab_size=int(loaded.model.config.get_text_config().vocab_size),
        max_total_tokens=limit,
        max_batch_total_tokens=num_blocks * config.block_size,
        block_size=config.block_size,
        attention=attention,
    )
    watermark = Watermark(
        info.vocab_size,
        loaded.device,
        gamma=config.watermark_gamma,
        delta=config.watermark_delta,
    )
    engine = Engine(
        runner.forward,
        scheduler,
        loaded.device,
        vocab_size=info.vocab_size,
        watermark=watermark,
        constraints=_constraints(config, info.vocab_size),
    )
    return engine, info


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


def _choose_backend(config: EngineConfig, loaded: LoadedModel) -> tuple[AttentionBackend, str]:
    """The fastest attention that can compute this model, and its name."""
    dims = {(shape.key_dim, shape.value_dim) for shape in loaded.layers.values()}
    fits = all(key == value and key % 8 == 0 and key <= 256 for key, value in dims)
    if config.enable_native_kernels and loaded.device.type == "cpu" and fits:
        kernels = cpu_kernels.load() if loaded.dtype is torch.float32 else None
        if kernels is not None:
            cpu_kernels.pack_model(loaded.model, kernels)
            return kernels, "native CPU kernels"
    return ReferenceAttention(), "reference attention"


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


def _num_blocks(config: EngineConfig, loaded: LoadedModel, max_total_tokens: int) -> int:
    """Blocks of the cache, which is never grown later."""
    per_token = bytes_per_token(loaded.layers, loaded.dtype)
    free = free_memory(loaded.device)
    if config.max_batch_total_tokens is not None:
        num_tokens = config.max_batch_total_tokens
    elif loaded.device.type == "cpu":
        wanted = max(_CPU_CACHE_TOKENS, max_total_tokens)
        num_tokens = min(wanted, int(free * _CPU_CACHE_FRACTION) // per_token)
    else:
        num_tokens = int(free * config.memory_fraction) // per_token
    num_blocks = -(-num_tokens // config.block_size)
    if (
        num_blocks * config.block_size < max_total_tokens
        or num_blocks * config.block_size * per_token > free
    ):
        raise ModelLoadError(
            f"Not enough memory to handle `max_total_tokens={max_total_tokens}`: the KV cache "
            f"would hold {num_tokens} tokens of {per_token} bytes, and {free} bytes are free"
        )
    return num_blocks
