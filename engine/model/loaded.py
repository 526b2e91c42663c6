"""A model that is ready to run on our attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..attention.kv_cache import LayerShape
from . import quantization


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run on our attention, and the shapes of its cache.

    `scheme` is what `quantize_model` has to do to it.
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
