"""Compares logits: a model's on our attention with its own, a kernel's with the reference's."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..attention.kv_cache import KVCache, LayerShape
from ..attention.paged import (
    IMPLEMENTATION,
    AttentionBackend,
    AttentionStep,
    ReferenceAttention,
    install,
)
from ..batch import AttentionInput
from ..protocol.errors import ModelLoadError
from .loaded import LoadedModel, first_line

logger = logging.getLogger(__name__)


_PROBE = "tokenwire_probe"
SELF_CHECK_TOKENS = 19  # more than a block, so that the check crosses a block's edge
_LONG_CHECK_TOKENS = 300  # more than a part of the cache that a kernel reads by itself
# Of logits, as a share of their spread. Half formats get so many roundings: 32 random layers of the
# 8B shape in bfloat16 come to 6 (0.05), both from transformers' own attention and among kernels.
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3}
_SELF_CHECK_ROUNDINGS = 20


def attach_paged_attention(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> LoadedModel:
    """Puts a model onto the paged attention, and compares its logits with the stock ones.

    Raises:
        ModelLoadError: the architecture is not supported.
    """
    name = type(model).__name__
    if not model._supports_attention_backend or getattr(model, "_is_stateful", False):
        raise ModelLoadError(
            f"{name} is not supported: it keeps a state that is not a paged KV cache"
        )
    install()
    try:
        expected = _stock_logits(model)
        loaded = LoadedModel(model, _probe_layers(model), device, dtype)
        model.set_attn_implementation(IMPLEMENTATION)
        actual = paged_logits(loaded, ReferenceAttention())
    except Exception as error:
        raise ModelLoadError(
            f"{name} does not run on paged attention: {first_line(error)}"
        ) from error
    difference = _difference(actual, expected)
    if not difference <= _tolerance(dtype):  # also when it is not a number
        raise ModelLoadError(
            f"{name} is not supported: its logits on paged attention differ by {difference:.2%}"
        )
    return loaded


def backend_agrees(
    loaded: LoadedModel, backend: AttentionBackend, block_size: int, cache_dtype: torch.dtype
) -> bool:
    """Whether the model has the logits of the reference with this backend. Logs why not.

    Tried are short texts and long ones, for which a backend may have kernels of their own.
    """
    text_config = loaded.model.config.get_text_config()
    longest = int(getattr(text_config, "max_position_embeddings", _LONG_CHECK_TOKENS))
    for num_tokens in (SELF_CHECK_TOKENS, min(_LONG_CHECK_TOKENS, longest)):
        trial = _Trial(num_tokens, block_size, cache_dtype)
        expected = paged_logits(loaded, ReferenceAttention(), trial)
        reason = objection(loaded, backend, expected, trial)
        if reason is not None:
            logger.warning("%s is not used: %s", type(backend).__name__, reason)
            return False
    return True


def objection(
    loaded: LoadedModel, backend: AttentionBackend, expected: Tensor, trial: _Trial | None = None
) -> str | None:
    """Why a backend cannot be used for a model, if it cannot."""
    try:
        actual = paged_logits(loaded, backend, trial)
    except torch.AcceleratorError:  # nothing else will run on this device
        raise
    except Exception as error:  # whatever a compiler can miss on a machine, the model is served
        return f"it does not run here: {first_line(error)}"
    difference = _difference(actual, expected)
    if difference <= _tolerance(loaded.dtype):
        return None
    return f"its logits differ by {difference:.2%}"


def _difference(actual: Tensor, expected: Tensor) -> float:
    """The worst token's root mean square difference of logits, as a share of all logits' spread.

    Not the largest difference of any: of half a million numbers in bfloat16 that comes to a
    quarter of the spread. A model that computes something else is at 1.4.
    """
    errors = (actual - expected).square().mean(dim=-1).sqrt()
    return float(errors.max()) / (float(expected.std()) or 1.0)


def _tolerance(dtype: torch.dtype) -> float:
    """How far logits may be from those expected."""
    roundings = _SELF_CHECK_ROUNDINGS * torch.finfo(dtype).eps
    return _SELF_CHECK_TOLERANCE.get(dtype, roundings)


def _self_check_ids(model: PreTrainedModel, num_tokens: int = SELF_CHECK_TOKENS) -> Tensor:
    """Int64 [1, num_tokens]: ids spread over the vocabulary."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, num_tokens + 1, device=model.device) * 7919 % vocab_size
    return ids.unsqueeze(0)


@dataclass(frozen=True, slots=True)
class _Trial:
    """How many tokens are computed, over which cache."""

    num_tokens: int
    block_size: int
    cache_dtype: torch.dtype


@torch.inference_mode()
def _stock_logits(model: PreTrainedModel) -> Tensor:
    logits = model(input_ids=_self_check_ids(model), use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits[0].float()


@torch.inference_mode()
def paged_logits(
    loaded: LoadedModel, backend: AttentionBackend, trial: _Trial | None = None
) -> Tensor:
    """The same logits by way of a cache, computed in two chunks and a decode step."""
    trial = trial or _Trial(SELF_CHECK_TOKENS, 16, loaded.dtype)
    model = loaded.model
    ids = _self_check_ids(model, trial.num_tokens)
    num_blocks = -(-trial.num_tokens // trial.block_size)
    cache = KVCache(loaded.layers, num_blocks, trial.block_size, trial.cache_dtype, model.device)
    chunks = []
    for start, end in itertools.pairwise((0, 11, trial.num_tokens - 1, trial.num_tokens)):
        positions = torch.arange(start, end, device=model.device)
        batch = AttentionInput(
            slot_mapping=positions,
            block_tables=torch.arange(cache.num_blocks, device=model.device).int().unsqueeze(0),
            query_start_loc=torch.tensor([0, end - start], device=model.device).int(),
            context_lens=torch.tensor([end], device=model.device).int(),
        )
        step = AttentionStep(cache.layers, batch, backend)
        output = model(
            input_ids=ids[:, start:end],
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            attention_step=step,
        )
        chunks.append(output.logits[0].float())
    return torch.cat(chunks)


@torch.inference_mode()
def _probe_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """Runs one token to see which layers attend, and with which shapes."""
    layers: dict[int, LayerShape] = {}

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        index = module.layer_idx
        assert isinstance(index, int)
        if index in layers:
            raise ValueError("layers share a cache")
        layers[index] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_PROBE, probe)
    model.set_attn_implementation(_PROBE)
    model(input_ids=_self_check_ids(model)[:, :1], use_cache=False)
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    if len(layers) != num_layers:
        raise ValueError(f"{len(layers)} of its {num_layers} layers use the attention interface")
    return layers
