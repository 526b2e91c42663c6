"""Latent attention, whose cache holds one short vector per token in place of every head's keys.

DeepSeek's attention (arXiv:2405.04434, section 2.1) computes the keys and values of all heads from
a latent of a token, and one rotated key for all heads from its hidden state. Both products with a
latent can be moved to the other side::

    query · (U_k latent)      = (U_kᵀ query) · latent
    Σ weight · (U_v latent)   = U_v (Σ weight · latent)

So attention runs over latents: one key head, [latent | rotated key], whose first part is also the
value. A token of DeepSeek V3 takes 576 numbers per layer, not 128 heads of 320.

Such a layer of transformers 5.23 expands latents in a method of its own, `expand_kv`, which
`absorb` replaces; everything before it stays the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .names import uses_ours

_ATTRIBUTE = "tokenwire_latent"  # of an attention layer
# Of rows [num_heads, num_tokens, K] with a matrix of each head: [num_heads, num_tokens, N].
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class HeadMatrices:
    """A matrix of each head, [num_heads, N, K]."""

    weight: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows times their head's matrix."""
        return torch.bmm(rows, self.weight.transpose(1, 2))


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The products with latents that a layer leaves to queries, and to what attention gives.

    Attributes:
        key_up: from a query's part without position to latents.
        value_up: from latents to values.
        content_size: of a query's part without position.
        latent_size: of a latent.
        value_size: of a head's value.
    """

    key_up: Product
    value_up: Product
    content_size: int
    latent_size: int
    value_size: int

    def query(self, query: Tensor) -> Tensor:
        """Queries [1, num_heads, num_tokens, …] that meet latents and rotated keys."""
        width = self.content_size
        content, position = query[0, ..., :width], query[0, ..., width:]
        return torch.cat((self.key_up(content), position), dim=-1).unsqueeze(0)

    def values(self, latents: Tensor) -> Tensor:
        """Values [num_tokens, num_heads, head size] of weighted sums of a cache's rows."""
        return self.value_up(latents[..., : self.latent_size].transpose(0, 1)).transpose(0, 1)


def absorb(model: nn.Module) -> int:
    """Makes layers with latent attention cache latents; returns how many there are.

    The logits must be compared before the model serves.
    """
    layers = [module for module in model.modules() if _has_latents(module)]
    for layer in layers:
        _absorb(layer)
    return len(layers)


def latent_attention(module: nn.Module) -> LatentAttention | None:
    """What `absorb` gave a layer, if anything."""
    found = getattr(module, _ATTRIBUTE, None)
    assert found is None or isinstance(found, LatentAttention)
    return found


def replace_products(model: nn.Module, make: Callable[[HeadMatrices], Product]) -> None:
    """Replaces the matrices of heads of all layers with latents.

    Attention of transformers cannot be computed any more then.
    """
    for layer in model.modules():
        found = latent_attention(layer)
        if found is not None:
            assert isinstance(found.key_up, HeadMatrices)
            assert isinstance(found.value_up, HeadMatrices)
            key_up, value_up = make(found.key_up), make(found.value_up)
            setattr(layer, _ATTRIBUTE, replace(found, key_up=key_up, value_up=value_up))


def _has_latents(module: Any) -> bool:
    up = getattr(module, "kv_b_proj", None)
    return (
        callable(getattr(module, "expand_kv", None)) and type(up) is nn.Linear and up.bias is None
    )


def _absorb(layer: Any) -> None:
    weight = layer.kv_b_proj.weight.detach()
    content, value, latent = layer.qk_nope_head_dim, layer.v_head_dim, weight.shape[1]
    by_head = weight.view(-1, content + value, latent)
    key_up, value_up = (part.contiguous() for part in by_head.split([content, value], dim=1))
    products = HeadMatrices(key_up.transpose(1, 2)), HeadMatrices(value_up)
    setattr(layer, _ATTRIBUTE, LatentAttention(*products, content, latent, value))
    layer.expand_kv = MethodType(_keep_latents, layer)
    layer.kv_b_proj = None  # its weight is in the two matrices


def _keep_latents(layer: Any, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value [1, 1, num_tokens, latent + rotated key]: the same tensor.

    Attention of transformers, with which logits are compared, gets those of every head.
    """
    if uses_ours(layer):
        rows = torch.cat((latents, rotated), dim=-1)
        return rows, rows
    latent = latent_attention(layer)
    assert latent is not None
    assert isinstance(latent.key_up, HeadMatrices)
    assert isinstance(latent.value_up, HeadMatrices)
    content = torch.matmul(latents, latent.key_up.weight)
    position = rotated.expand(-1, content.shape[1], -1, -1)
    values = torch.matmul(latents, latent.value_up.weight.transpose(1, 2))
    return torch.cat((content, position), dim=-1), values
