"""A model that runs on the paged attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..attention.kv_cache import LayerShape
from . import quantization


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that runs on the paged attention, and the shapes of its cache by layer.

    `scheme` says how `quantize_model` is to quantise it; None for not at all.
    """

    model: PreTrainedModel
    layers: dict[int, LayerShape]
    device: torch.device
    dtype: torch.dtype
    scheme: quantization.Scheme | None = None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
