"""Has the experts of Llama 4 compute the tokens that chose them, and no others.

A token's weights there are those of what its experts get, not of what they give. So transformers
multiplies each token by a weight for each expert, which is 0 for all that it did not choose, and
multiplies all of these by the experts' matrices; the last bits of that product of torch's depend on
how many tokens there are. Here such experts get transformers' interface of experts, by which
`experts.py` packs them as it does others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_MATRICES = {"gate_up_proj", "down_proj"}


def use_interface(model: nn.Module) -> None:
    """Gives experts whose input is weighed the interface of experts; once more changes nothing."""
    for block in model.modules():
        if _weighs_inputs(block) and not hasattr(block.experts, "has_gate"):
            experts: Any = block.experts
            experts.has_gate, experts.has_bias, experts.is_transposed = True, False, True
            experts._apply_gate = partial(_gated, experts.act_fn)
            block.forward = partial(_forward, block, experts, block.forward)


def _weighs_inputs(block: Any) -> bool:
    """Whether a module is such a mixture: its experts take nothing but rows."""
    parts = (getattr(block, name, None) for name in ("router", "experts", "shared_expert"))
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    names = {name for name, _ in block.experts.named_parameters(recurse=False)}
    return names == _MATRICES and len(inspect.signature(block.experts.forward).parameters) == 1


def _gated(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * activation(gate)


def _forward(
    block: Any, stock: nn.Module, compute: Callable[..., Any], hidden_states: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums of results [num_tokens, width], and the router's logits."""
    if block.experts is stock:  # which is not packed yet
        found: tuple[Tensor, Tensor] = compute(hidden_states)
        return found
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = block.router(x)
    weights, index = scores.topk(block.top_k)
    chosen = (x.unsqueeze(1) * weights.unsqueeze(2)).flatten(0, 1)  # a row for each choice
    results = block.experts(chosen, index.view(-1, 1), torch.ones_like(weights).view(-1, 1))
    output = block.shared_expert(x)
    for result in results.view(*weights.shape, -1).unbind(1):
        output = output + result
    return output, logits
