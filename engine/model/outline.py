"""A checkpoint's model without its weights: what it says of itself before they are loaded.

Making one takes a tenth of a second where loading takes minutes. So what its layers and their
shapes decide is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..attention.kv_cache import free_memory
from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from ..shards.group import Group
from . import architecture
from .division import divided_weights
from .load_report import check_gguf_biases
from .source import is_gguf

# Looks at a model without weights, and raises `ModelLoadError` to refuse it.
Look = Callable[[PreTrainedModel], None]


def auto_class(model_config: Any) -> Any:
    """The class of transformers that makes a model of a configuration.

    Many models that take images exist only with their image part. It is loaded, and not used.

    Raises:
        ValueError: models of this kind do not continue texts.
    """
    kind = type(model_config)
    names = getattr(model_config, "auto_map", None) or {}
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or AutoModelForCausalLM.__name__ in names:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ValueError(f"models of type {model_config.model_type} do not continue texts")


def check_outline(
    config: EngineConfig,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    group: Group | None = None,
    looks: tuple[Look, ...] = (),
) -> None:
    """Refuses what is known to be wrong with a model before its weights are loaded.

    Args:
        config: the engine's configuration.
        model_config: that of the model, of transformers.
        dtype: in which the model computes.
        device: where it will run.
        group: the ranks among which it is to be divided; None to keep it whole.
        looks: what else has something to say against it.

    Raises:
        ModelLoadError: it is not supported, has fewer positions than are wanted, does not fit into
            a device's memory as it is divided, or one of `looks` refuses it.
        ValueError: it cannot be divided, or leaves out biases of a GGUF file.
    """
    architecture.max_total_tokens(config, model_config)
    reason = architecture.refusal_of_configuration(model_config)
    if not (reason or group or looks or is_gguf(config)):
        return
    model = outline(config, model_config)
    if reason is not None:
        raise ModelLoadError(f"{type(model).__name__} is not supported: {reason}")
    if is_gguf(config):
        check_gguf_biases(config.model_id, model)
    for look in looks:
        look(model)
    if group is not None:
        num_weights = divided_weights(lambda: outline(config, model_config), group.size)
        _check_room(config, num_weights * dtype.itemsize, device)


def outline(config: EngineConfig, model_config: Any) -> PreTrainedModel:
    """A model whose weights have shapes alone."""
    make: Any = auto_class(model_config).from_config
    with torch.device("meta"):
        model = make(deepcopy(model_config), trust_remote_code=config.trust_remote_code)
    assert isinstance(model, PreTrainedModel)
    return model


def _check_room(config: EngineConfig, needed: int, device: torch.device) -> None:
    """Checks that a rank's part of the weights fits into its GPU; a host's has been, as a whole.

    Raises:
        ModelLoadError: it does not; the message has both numbers.
    """
    if device.type == "cuda" and needed > (free := free_memory(device)):
        raise ModelLoadError(
            f"not enough memory to load {config.model_id}: each of {config.num_shards} ranks has "
            f"{needed / 1e9:.1f} GB of its weights, and {free / 1e9:.1f} GB of its device are free"
        )
