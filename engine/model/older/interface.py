"""Lets layers that compute attention themselves call the attention interface of transformers.

Older code has attention within its layers. Where that is a method of its own, or a few lines, the
layers of a model get it anew: with an attention of transformers they compute as before, and with
one of ours they call it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_KINDS = {
    "bloom",
    "codegen",
    "falcon",
    "gpt_neo",
    "gptj",
    "mpt",
    "xglm",
}  # each is a module of this folder


def use_interface(model: PreTrainedModel) -> None:
    """Makes parts of a model instances of other classes, if it is of a kind that is known.

    Their classes are changed, and not only their methods: passes look at a layer's class.
    """
    kind = model.config.model_type
    if kind not in _KINDS:
        return
    known = import_module(f".{kind}", __package__)
    parts: list[Any] = [part for part in model.modules() if type(part) in known.CLASSES]
    if not parts:  # it was changed before, or its code came with its checkpoint
        return
    linear_bias = known.linear_bias(model) if hasattr(known, "linear_bias") else None
    for part in parts:
        part.__class__ = known.CLASSES[type(part)]
        part.config, part.linear_bias = model.config, linear_bias
    # Transformers looks for the interface in the source code of a model's class.
    model._can_set_attn_implementation = lambda: True  # type: ignore[method-assign]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any
) -> Tensor:
    """[1, tokens, heads, head size] of query, key and value [1, heads, tokens, head size]."""
    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    output: Tensor = function(module, query, key, value, None, scaling=scale, **options)[0]
    return output
