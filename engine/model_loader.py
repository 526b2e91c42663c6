"""Loads a transformers model and proves, before it serves, that our attention gives its logits."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .attention import IMPLEMENTATION, AttentionStep, ReferenceAttention, install
from .batch import AttentionInput
from .config import EngineConfig
from .errors import ModelLoadError
from .kv_cache import KVCache, LayerShape

logger = logging.getLogger(__name__)

_PROBE = "tokenwire_probe"
_SELF_CHECK_TOKENS = 19  # more than a block, so that the check crosses a block's edge
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3}  # of logits; half formats: 5e-2 of their spread


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run on our attention, and the shapes of its cache."""

    model: PreTrainedModel
    layers: dict[int, LayerShape]
    device: torch.device
    dtype: torch.dtype


def load_model(config: EngineConfig) -> LoadedModel:
    """Loads weights and checks that the model can be served.

    Raises:
        ModelLoadError: the checkpoint is missing or broken, does not fit into memory, or is of an
            architecture that does not run on paged attention. The message is one line.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        model_config = AutoConfig.from_pretrained(
            config.model_id, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        dtype = _choose_dtype(config.dtype, device, model_config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.model_id,
            config=model_config,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, report = loaded
        if report["missing_keys"]:  # transformers would fill them with noise and go on
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(report['missing_keys']))}")
        nn.Module.to(model, device)
        nn.Module.eval(model)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory to load {config.model_id}: {error}") from error
    except MemoryError as error:
        raise ModelLoadError(f"not enough memory to load {config.model_id}") from error
    except Exception as error:  # whatever a checkpoint can break ends as one line for its owner
        raise ModelLoadError(f"cannot load {config.model_id}: {_first_line(error)}") from error
    return prepare_model(model, device, dtype)


def prepare_model(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> LoadedModel:
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
        layers = _probe_layers(model)
        model.set_attn_implementation(IMPLEMENTATION)
        actual = _paged_logits(model, layers, dtype)
    except Exception as error:
        raise ModelLoadError(
            f"{name} does not run on paged attention: {_first_line(error)}"
        ) from error
    spread = float(expected.std()) or 1.0
    tolerance = _SELF_CHECK_TOLERANCE.get(dtype, 5e-2) * max(1.0, spread)
    difference = float((expected - actual).abs().max())
    if not difference <= tolerance:  # also when it is not a number
        raise ModelLoadError(
            f"{name} is not supported: its logits on paged attention differ by {difference:.3g}"
        )
    return LoadedModel(model, layers, device, dtype)


def _choose_dtype(name: str | None, device: torch.device, model_config: Any) -> torch.dtype:
    if name is not None:
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32  # half formats are emulated, and slower, on most CPUs
    dtype = getattr(model_config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _self_check_ids(model: PreTrainedModel) -> Tensor:
    """Int64 [1, tokens]: ids spread over the vocabulary."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, _SELF_CHECK_TOKENS + 1, device=model.device) * 7919 % vocab_size
    return ids.unsqueeze(0)


@torch.inference_mode()
def _stock_logits(model: PreTrainedModel) -> Tensor:
    logits = model(input_ids=_self_check_ids(model), use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits[0].float()


@torch.inference_mode()
def _paged_logits(
    model: PreTrainedModel, layers: dict[int, LayerShape], dtype: torch.dtype
) -> Tensor:
    """The same logits by way of a cache, computed in two chunks."""
    ids = _self_check_ids(model)
    num_tokens = ids.shape[1]
    block_size = 16
    cache = KVCache(layers, -(-num_tokens // block_size), block_size, dtype, model.device)
    chunks = []
    for start, end in ((0, 11), (11, num_tokens)):
        positions = torch.arange(start, end, device=model.device)
        batch = AttentionInput(
            slot_mapping=positions,
            block_tables=torch.arange(cache.num_blocks, device=model.device).int().unsqueeze(0),
            query_start_loc=torch.tensor([0, end - start], device=model.device).int(),
            context_lens=torch.tensor([end], device=model.device).int(),
        )
        step = AttentionStep(cache.layers, batch, ReferenceAttention())
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
