"""How a layer tells that the attention it uses is ours: by the name in transformers' interface."""

from __future__ import annotations

from typing import Any

_OURS = "tokenwire_"  # what the names of our own attention begin with


def uses_ours(layer: Any) -> bool:
    """Whether an attention layer's model uses attention of ours, and none of transformers."""
    name: str = layer.config._attn_implementation
    return name.startswith(_OURS)
