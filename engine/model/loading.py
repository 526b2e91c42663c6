"""Loads a transformers model from a checkpoint; `prepare.py` changes it afterwards."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from . import quantization
from .loaded import LoadedModel, first_line
from .self_check import attach_paged_attention

logger = logging.getLogger(__name__)


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
        scheme = quantization.choose(config, model_config, device, dtype)
        model = _load_weights(config, model_config, dtype)
        nn.Module.to(model, device)
        nn.Module.eval(model)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory to load {config.model_id}: {error}") from error
    except MemoryError as error:
        raise ModelLoadError(f"not enough memory to load {config.model_id}") from error
    except Exception as error:  # a broken checkpoint may raise anything; the user reads one line
        raise ModelLoadError(f"cannot load {config.model_id}: {_reason(error, config)}") from error
    return replace(attach_paged_attention(model, device, dtype), scheme=scheme)


def _reason(error: Exception, config: EngineConfig) -> str:
    if not config.trust_remote_code and "trust_remote_code" in str(error):
        return "it needs code that comes with it, which runs only with --trust-remote-code"
    return first_line(error)


def _load_weights(config: EngineConfig, model_config: Any, dtype: torch.dtype) -> Any:
    """Loads a model's weights with transformers.

    Raises:
        ValueError: the checkpoint lacks some of them.
    """
    loaded: Any = auto_class(model_config).from_pretrained(
        config.model_id,
        config=model_config,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = loaded
    if report["missing_keys"]:  # transformers initialises them randomly and only warns
        raise ValueError(f"the checkpoint lacks {', '.join(sorted(report['missing_keys']))}")
    return model


def auto_class(model_config: Any) -> Any:
    """The class of transformers that makes a model of a configuration.

    Many models that take images exist only with their image part. It is loaded, and not used.
    """
    kind = type(model_config)
    names = getattr(model_config, "auto_map", None) or {}
    has_text = kind in MODEL_FOR_CAUSAL_LM_MAPPING or AutoModelForCausalLM.__name__ in names
    if not has_text and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _choose_dtype(name: str | None, device: torch.device, model_config: Any) -> torch.dtype:
    if name is not None:
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32  # most CPUs emulate fp16 and bf16, which is slower
    dtype = getattr(model_config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16
