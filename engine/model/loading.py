"""Loads a transformers model from a checkpoint; `prepare.py` changes it afterwards."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils.quantization_config import GgufConfig

from ..attention.kv_cache import free_memory
from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from ..shards.cut import Cut
from ..shards.group import Group
from . import quantization
from .device import choose_device
from .division import check_divisible, divide_checked
from .gguf_reading import quick_gguf
from .gguf_rope import scale_configuration, scale_frequencies
from .load_failure import load_failure
from .load_report import check_report
from .loaded import LoadedModel
from .outline import Look, auto_class, check_outline
from .self_check import attach_paged_attention
from .source import is_gguf, source
from .weight_files import check_scales
from .weight_size import check_room, weight_bytes

logger = logging.getLogger(__name__)

_COMPUTED_IN = (torch.bfloat16, torch.float16, torch.float32)


def load_model(
    config: EngineConfig, group: Group | None = None, looks: tuple[Look, ...] = ()
) -> LoadedModel:
    """Loads weights and checks that the model can be served.

    Args:
        config: the engine's configuration.
        group: the ranks among which the model is divided; None to keep it whole.
        looks: they see the model without weights first, and may refuse it.

    Raises:
        ModelLoadError: the checkpoint is missing or broken, does not fit into memory, or is of an
            architecture that does not run on paged attention; or there is a GPU that torch cannot
            use. The message is one line.
    """
    device = choose_device(config.device)
    try:
        with quick_gguf() if is_gguf(config) else nullcontext():
            model, dtype, scheme, cuts = _load(config, device, group, looks)
    except ModelLoadError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory to load {config.model_id}: {error}") from error
    except MemoryError as error:
        raise ModelLoadError(f"not enough memory to load {config.model_id}") from error
    except Exception as error:  # a broken checkpoint may raise anything; the user reads one line
        raise ModelLoadError(
            f"cannot load {config.model_id}: {load_failure(error, config)}"
        ) from error
    return replace(attach_paged_attention(model, device, dtype), scheme=scheme, cuts=cuts)


def _load(
    config: EngineConfig, device: torch.device, group: Group | None, looks: tuple[Look, ...]
) -> tuple[Any, torch.dtype, quantization.Scheme | None, dict[str, Cut]]:
    """A model on its device, the format of its weights, how to quantise them, and its cuts."""
    model_config = AutoConfig.from_pretrained(**source(config))
    # What suited the machine that saved it; transformers chooses for this one.
    model_config._attn_implementation = model_config._experts_implementation = None
    if is_gguf(config):
        scale_configuration(config, model_config)
    dtype = _choose_dtype(config, device, model_config)
    scheme = quantization.choose(config, model_config, device, dtype)
    place = device if group is None else torch.device("cpu")
    if group is not None:
        check_divisible(model_config)
    bits = quantization.stored_bits(model_config, device)
    check_room(config, dtype, place, bits)
    check_outline(config, model_config, dtype, device, group, looks)
    if bits is not None:
        check_scales(config)
        _log_dequantized(f"quantised weights of {bits} bits", config, dtype)
    model = _load_weights(config, model_config, dtype, place)
    if config.dtype is not None and _dtype_of(config.dtype) is not dtype:
        _round_weights(model, _dtype_of(config.dtype))
    if is_gguf(config):
        scale_frequencies(config, model)
    cuts = {} if group is None else divide_checked(model, group)
    nn.Module.to(model, device)
    nn.Module.eval(model)
    return model, dtype, scheme, cuts


def _load_weights(
    config: EngineConfig, model_config: Any, dtype: torch.dtype, device: torch.device
) -> Any:
    """Loads a model's weights with transformers.

    Onto a GPU they go one by one: the host never has to hold more than a few of them.

    Raises:
        ValueError: the checkpoint lacks some of them, has others, or their shapes are wrong.
    """
    loaded: Any = auto_class(model_config).from_pretrained(
        **source(config),
        **_dequantized(config, dtype),
        config=model_config,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # the report has them, where the error has no names
        output_loading_info=True,
        device_map=None if device.type == "cpu" else {"": device},
    )
    model, report = loaded
    described = getattr(model_config, "quantization_config", None)
    stays = described is not None and quantization.stored_bits(model_config, device) is None
    check_report(report, model, is_quantized=stays)
    return model


def _dequantized(config: EngineConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments with which transformers makes plain weights of a GGUF file's."""
    if not is_gguf(config):
        return {}
    _log_dequantized("weights of a GGUF file", config, dtype)
    return {"quantization_config": GgufConfig(dequantize=True)}


def _log_dequantized(what: str, config: EngineConfig, dtype: torch.dtype) -> None:
    advice = "" if config.quantize else "; --quantize int8 or int4 makes them small again"
    logger.info("%s are dequantised to %s%s", what, str(dtype)[6:], advice)


def _choose_dtype(config: EngineConfig, device: torch.device, model_config: Any) -> torch.dtype:
    """In which the model computes.

    The kernels for CPUs compute in float32, whatever the weights are rounded to: torch is many
    times slower in 16 bits. It is left to where there are no kernels, or where the weights do not
    fit in float32, which they have to until the layers are packed. A GPU computes in the format
    that is asked for, or else in the checkpoint's own.

    Raises:
        ModelLoadError: nothing is computed in the checkpoint's own.
    """
    if device.type == "cpu" and config.dtype is None:
        return torch.float32
    if quantization.kernels_of(config, device, torch.float32) is not None:
        bits = quantization.stored_bits(model_config, device)
        if weight_bytes(config, torch.float32, bits) <= free_memory(device):
            return torch.float32
    if config.dtype is not None:
        return _dtype_of(config.dtype)
    return _own_dtype(model_config)


def _own_dtype(model_config: Any) -> torch.dtype:
    """The format that a checkpoint names for its weights; float16, as in TGI, if it names none.

    Raises:
        ModelLoadError: no model is computed in it.
    """
    parts = (model_config, model_config.get_text_config())
    named = [part.dtype for part in parts if isinstance(part.dtype, torch.dtype)]
    dtype = named[0] if named else torch.float16
    if dtype is torch.float64:
        logger.info("the checkpoint names float64: it is computed in float32")
        return torch.float32
    if dtype not in _COMPUTED_IN:
        raise ModelLoadError(
            f"the checkpoint names {str(dtype)[6:]} as its dtype, in which no model is computed; "
            "--dtype bfloat16, float16 or float32 says in which one it is"
        )
    return dtype


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@torch.no_grad()
def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds all weights to what a dtype can hold; their own dtype stays.

    Raises:
        ValueError: a weight is too large for the dtype.
    """
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or not weight.numel():
            continue
        least, greatest = (float(value) for value in weight.aminmax())
        if torch.finfo(dtype).max < max(-least, greatest) < math.inf:
            raise ValueError(f"{name} has values that dtype={str(dtype)[6:]} cannot hold")
        weight.copy_(weight.to(dtype))
