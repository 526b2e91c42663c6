"""Turns a checkpoint into a model that is ready to serve: the passes over it, and their order.

Each pass has its own check, in `passes.py` or `self_check.py`: if it fails, the pass is undone or
the model is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..attention.paged import AttentionBackend, ReferenceAttention
from ..kernels import cpu as cpu_kernels
from ..kernels import has_triton
from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from . import architecture, image_part
from .loaded import LoadedModel
from .loading import load_model
from .passes import (
    fuse_layers,
    fuse_rotation,
    layers_in_use,
    merge_projections,
    merge_residuals,
    pack_layers,
    quantize_model,
    use_rotary_tables,
    warm_up,
)
from .quantization import multiplies_fp8
from .self_check import backend_agrees, recomputes_exactly
from .thresholds import served_tokens

logger = logging.getLogger(__name__)


_CACHE_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}  # TGI's names


LoadModel = Callable[[EngineConfig], LoadedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model that is ready to serve.

    Attributes:
        loaded: the model, after all passes.
        backend: computes its attention.
        attention: the backend's name, for logs and `EngineInfo`.
        cache_dtype: of keys and values in the KV cache.
        max_total_tokens: of a sequence; the model has no position after that.
        notes: sentences on what is served otherwise than the checkpoint says.
    """

    loaded: LoadedModel
    backend: AttentionBackend
    attention: str
    cache_dtype: torch.dtype
    max_total_tokens: int
    notes: tuple[str, ...] = ()


def prepare(config: EngineConfig, load: LoadModel = load_model) -> PreparedModel:
    """Loads a model and makes it as fast as its device allows.

    The order matters:

    1. Load, and compare logits on the paged attention with those of transformers' own attention, on
       a short text and beyond every length at which the model changes: later passes are compared
       with the paged reference attention.
    2. Choose the attention backend, whose check needs the original layers in full precision. The
       rotary embedding moves into its write of keys and values, which depends on the backend.
    3. Fuse layers, on a GPU also query, key and value, and tabulate the rotary embedding: their
       checks need full precision as well.
    4. Find the layers whose weight the model reads itself: those stay. Quantise the others. Logits
       differ from the checkpoint's from here on, so no exact check can follow.
    5. Pack the remaining fp32 linear layers on a CPU, which frees their original weights.
    6. Find out whether the final model recomputes a text bit for bit, for the log.
    7. Warm up: compile kernels for the final layers before the first request.

    The image part of a model that takes images is set aside meanwhile: no check would see it.

    Args:
        config: the engine's configuration.
        load: loads the model; benchmarks pass one that makes a random model.

    Raises:
        ModelLoadError: the model cannot be served with this configuration.
    """
    loaded = load(config)
    max_total_tokens, limit = served_tokens(
        loaded,
        architecture.max_total_tokens(config, loaded.model.config),
        is_asked=config.max_total_tokens is not None,
    )
    without_images = image_part.refusal(loaded.model)
    if without_images is not None:
        logger.warning("%s", without_images)
    with image_part.set_aside(loaded.model, loaded.stock_attention):
        return _prepared(config, loaded, max_total_tokens, [limit, without_images])


def _prepared(
    config: EngineConfig, loaded: LoadedModel, max_total_tokens: int, notes: list[str | None]
) -> PreparedModel:
    """Steps 2 to 7 of `prepare`."""
    cache_dtype = _cache_dtype(config, loaded)
    loaded = _with_square_heads(config, loaded, cache_dtype)
    backend, attention = _choose_backend(config, loaded, cache_dtype)
    notes.append(_slow_attention(loaded.device, backend))
    if config.enable_native_kernels and config.enable_fusion:
        fuse_layers(loaded)
        if loaded.device.type == "cuda":  # on a CPU it is no faster
            merge_projections(loaded)
            merge_residuals(loaded)
        notes.append(use_rotary_tables(loaded, max_total_tokens))
    left = layers_in_use(loaded)
    notes.append(quantize_model(loaded, left))
    if (kernels := native_kernels(config, loaded)) is not None:
        pack_layers(loaded, kernels, left)
    _log_exactness(recomputes_exactly(loaded, backend, config.block_size, cache_dtype))
    loaded.known.forget()
    if loaded.device.type == "cuda":
        warm_up(loaded, backend, config.block_size, cache_dtype)
    return PreparedModel(
        loaded=loaded,
        backend=backend,
        attention=attention,
        cache_dtype=cache_dtype,
        max_total_tokens=max_total_tokens,
        notes=tuple(filter(None, notes)),
    )


def _log_exactness(is_exact: bool) -> None:
    if is_exact:
        logger.info("texts that are computed again, in other steps, are the same bit for bit")
    else:
        logger.info(
            "texts that are computed again, in other steps, differ by rounding: a sampled text may "
            "change after a crash or a preemption"
        )


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
    kernels = native_kernels(config, loaded)
    if kernels is not None and cache_dtype is torch.float32 and _fits(loaded, kernels):
        if config.enable_fused_rotation:
            fuse_rotation(loaded, kernels)
        return kernels, "native CPU kernels"
    if loaded.device.type == "cpu" and config.enable_native_kernels:
        _warn_of_reference(config, loaded, cache_dtype)
    return ReferenceAttention(), "reference attention"


def _slow_attention(device: torch.device, backend: AttentionBackend) -> str | None:
    """What to tell of a GPU whose kernels are not used, whatever keeps it from them."""
    if device.type != "cuda" or not isinstance(backend, ReferenceAttention):
        return None
    note = "attention on this GPU is the reference: many times slower, and no step is recorded"
    logger.error("%s", note)
    return note


def _warn_of_reference(config: EngineConfig, loaded: LoadedModel, cache_dtype: torch.dtype) -> None:
    """Says which setting keeps a CPU from its kernels, if one does."""
    if loaded.dtype is not torch.float32:
        if cpu_kernels.load() is None:
            return  # what keeps them from being built has been said
        logger.warning(
            "the kernels for CPUs compute in float32, for which these weights are too large: with "
            "dtype=%s torch computes, many times slower",
            config.dtype,
        )
    elif cache_dtype is not torch.float32:
        logger.warning(
            "attention on this CPU is the reference, many times slower, with kv_cache_dtype=%s",
            config.kv_cache_dtype,
        )


def _with_square_heads(
    config: EngineConfig, loaded: LoadedModel, cache_dtype: torch.dtype
) -> LoadedModel:
    """The model with values in the cache that are as wide as keys, if the kernels take it then.

    So has MiMo V2 Flash: zeros after values of 128, for keys of 192. That is a fifth more memory;
    the reference attention takes many times as long.
    """
    kernels = native_kernels(config, loaded)
    if kernels is None or cache_dtype is not torch.float32:
        return loaded
    layers = {
        index: shape
        if shape.value_dim >= shape.key_dim
        else replace(shape, value_dim=shape.key_dim)
        for index, shape in loaded.layers.items()
    }
    widened = replace(loaded, layers=layers)
    return widened if layers != loaded.layers and _fits(widened, kernels) else loaded


def _fits(loaded: LoadedModel, kernels: cpu_kernels.CpuKernels) -> bool:
    """Whether the kernels take the heads of all layers."""
    return all(
        shape.key_dim == shape.value_dim
        and shape.key_dim % 8 == 0
        and shape.key_dim <= kernels.max_head_size
        for shape in loaded.layers.values()
    )


def native_kernels(config: EngineConfig, loaded: LoadedModel) -> cpu_kernels.CpuKernels | None:
    """The kernels for a model on a CPU; None if they cannot compute it or are switched off."""
    if not config.enable_native_kernels or loaded.device.type != "cpu":
        return None
    return cpu_kernels.load() if loaded.dtype is torch.float32 else None


def _triton_attention(
    config: EngineConfig, loaded: LoadedModel, cache_dtype: torch.dtype
) -> AttentionBackend | None:
    """The GPU kernels, where Triton is installed, can compile them and they compute this model."""
    if not has_triton():
        return None
    from ..kernels.triton_attention import MAX_HEAD_DIM, TritonAttention

    dims = [max(shape.key_dim, shape.value_dim) for shape in loaded.layers.values()]
    if max(dims, default=0) > MAX_HEAD_DIM:
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
