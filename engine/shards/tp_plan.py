"""How a model's layers are divided among ranks: as transformers says, or as is usual."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class Style(Enum):
    """How a layer or parameter is divided."""

    OUTPUTS = "by outputs"
    GATHERED_OUTPUTS = "by outputs, put together afterwards"
    INPUTS = "by inputs, which come divided"
    SPLIT_INPUTS = "by inputs, which come whole"
    PAIRED_OUTPUTS = "by outputs, of which two matrices are stacked"
    ROWS = "by tokens of the vocabulary"
    SUMMED = "not itself: its output is a sum over the ranks"
    WHOLE = "not at all"


# The names that transformers has for them; those that concern gradients alone change nothing here.
_STYLES = {
    "colwise": Style.OUTPUTS,
    "colwise_gather_output": Style.GATHERED_OUTPUTS,
    "colwise_rep": Style.GATHERED_OUTPUTS,
    "rowwise": Style.INPUTS,
    "rowwise_split_input": Style.SPLIT_INPUTS,
    "rowwise_rep": Style.SPLIT_INPUTS,
    "packed_colwise": Style.PAIRED_OUTPUTS,
    "embedding_rowwise": Style.ROWS,
    "moe_tp_experts": Style.SUMMED,
    "all_reduce": Style.SUMMED,
    "replicated_with_grad_allreduce": Style.WHOLE,
    "replicate": Style.WHOLE,
    "local_params": Style.WHOLE,
    "mla_kv_a_proj": Style.WHOLE,
}
# Models that transformers has no plan for, by the names of their parts for texts, and whose layers
# have the usual names. Only those that were compared; what is not named here stays whole.
_UNPLANNED = frozenset({"bamba", "falcon_h1", "lfm2", "qwen3_vl_text"})
_ATTENTION = {"colwise": ("q_proj", "k_proj", "v_proj"), "rowwise": ("o_proj", "out_proj")}
_MLP = {"colwise": ("gate_proj", "up_proj", "w1", "w3"), "rowwise": ("down_proj", "w2")}
_USUAL = {"embed_tokens": "embedding_rowwise"} | {
    f"layers.*.{part}.{name}": style
    for part, layers in (("self_attn", _ATTENTION), ("mlp", _MLP), ("feed_forward", _MLP))
    for style, names in layers.items()
    for name in names
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def styles_of(model: PreTrainedModel) -> dict[str, Style]:
    """How each layer and parameter of a model is divided, by name; others are not.

    Raises:
        ValueError: there is no plan for this model, or one with a style that is not known here.
    """
    plan = _plan_of(model)
    unknown = sorted({style for style in plan.values() if style not in _STYLES})
    if unknown:
        raise ValueError(f"its layers are divided in a way not known here: {', '.join(unknown)}")
    styles = {
        name: _STYLES[plan[wildcard]]
        for name in _names(model)
        if (wildcard := _NUMBER.sub("*", name)) in plan
    }
    if not {Style.INPUTS, Style.SPLIT_INPUTS} & set(styles.values()):
        raise ValueError("transformers has no plan of how its layers are divided")
    return styles


def _plan_of(model: PreTrainedModel) -> dict[str, str]:
    """The names of transformers' styles, by those of layers with `*` in place of numbers."""
    plan = dict(model.tp_plan)
    if model.config.get_text_config().model_type in _UNPLANNED:
        stock: Any = model
        decoder = stock.get_decoder()
        (path,) = (name for name, module in model.named_modules() if module is decoder)
        plan |= {f"{path}.{name}": style for name, style in _USUAL.items()}
    return plan


def _names(model: nn.Module) -> list[str]:
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return modules + [name for name, _ in model.named_parameters()]
