"""Lets layers that compute attention themselves call the attention interface of transformers.

Older code has attention within its layers. Where that is a method of its own, or a few lines, the
layers of a model get it anew: with an attention of transformers they compute as before, and with
one of ours they call it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.names import uses_ours


def use_interface(model: PreTrainedModel) -> None:
    """Changes the layers of a model, if they are of a kind that is known.

    BLOOM and MPT, and Falcon with ALiBi, are not: their attention adds a bias that depends on the
    distance, which the paged attention does not have.
    """
    change = _KINDS.get(model.config.model_type)
    is_changed = "_can_set_attn_implementation" in vars(model)
    if change is None or is_changed or getattr(model.config, "alibi", False):
        return
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            change(module)
    # Transformers looks for the interface in the source code of a model's class.
    model._can_set_attn_implementation = lambda: True  # type: ignore[method-assign]


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[1, tokens, heads, head size] of query, key and value [1, heads, tokens, head size]."""
    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    output: Tensor = function(module, query, key, value, None, scaling=scale)[0]
    return output


def _change_gptj(module: Any) -> None:
    if not hasattr(module, "_attn"):
        return
    own = module._attn

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Any:
        if not uses_ours(module):
            return own(query, key, value, mask)
        return attend(module, query, key, value, 1 / module.scale_attn).transpose(1, 2), None

    module._attn = attention


def _change_falcon(module: Any) -> None:
    if hasattr(module, "query_key_value"):
        from .falcon_attention import InterfacedFalconAttention

        # Its class and not only its method: passes look for a layer's rotation in its class.
        module.__class__ = InterfacedFalconAttention


_KINDS = {"gptj": _change_gptj, "falcon": _change_falcon}
