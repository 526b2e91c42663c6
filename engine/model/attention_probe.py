"""What the attention layers of a model hand to transformers' attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..attention.kv_cache import LayerShape
from ..attention.latent import latent_attention
from ..recurrent.find import FoundLayers

_PROBE = "tokenwire_probe"


@torch.inference_mode()
def probe_layers(
    model: PreTrainedModel, token_id: Tensor, found: FoundLayers
) -> tuple[dict[int, LayerShape], dict[int, int]]:
    """Runs one token to find out which layers have attention, and what they hand to it.

    Args:
        model: its attention is the probe afterwards, which computes nothing.
        token_id: int64 [1, 1].
        found: what its layers put into a cache of transformers.

    Returns:
        By the index of a layer, the shape of its keys and values; and its window, if it has one.

    Raises:
        ValueError: layers share a cache, or some do not use the attention interface.
    """
    layers: dict[int, LayerShape] = {}
    windows: dict[int, int] = {}

    def probe(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        sliding_window: int | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        index = module.layer_idx
        assert isinstance(index, int)
        if index in layers:
            raise ValueError("layers share a cache")
        layers[index] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1], value is key)
        if sliding_window is not None:
            windows[index] = sliding_window
        latent = latent_attention(module)
        size = value.shape[-1] if latent is None else latent.value_size
        return query.new_zeros(1, query.shape[2], query.shape[1], size), None

    AttentionInterface.register(_PROBE, probe)
    model.set_attn_implementation(_PROBE)
    model(input_ids=token_id, use_cache=False)
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    if not layers and not found.stateful:
        raise ValueError(f"none of its {num_layers} layers use the attention interface")
    if others := found.attending - layers.keys():
        raise ValueError(
            f"{len(others)} of its {num_layers} layers do not use the attention interface"
        )
    return layers, windows
