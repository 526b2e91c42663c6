"""An initialization that gives a fresh model a rough copying circuit in its first two layers.

Small models need many million tokens of training before attention heads that copy ("induction
heads") appear. Here one head of the first layer initially attends to the previous token, and the
heads of the second layer attend to positions whose previous token is the current one. Training
refines them; no weight is frozen.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

SPREAD = 0.15  # standard deviation of the embeddings, large so that early steps cannot undo it
CONSTANT = 6.0  # size of the constant embedding component, in standard deviations
FOCUS = 60.0  # how sharply the first head attends to the previous token
MATCH = 4.5  # how sharply the second layer attends to equal tokens
OUTPUT = 0.35  # weight of the last norm, which keeps the first logits moderate
SLOW_PAIRS = 18  # rotary pairs too slow to disturb a match within a few hundred tokens


def projection(rows: int, columns: int) -> torch.Tensor:
    """Return a random matrix with orthonormal rows that ignores the constant component."""
    matrix = torch.linalg.qr(torch.randn(columns - 1, rows)).Q.T
    return torch.cat([torch.zeros(rows, 1), matrix], dim=1)


def slow_dimensions(head_dim: int) -> torch.Tensor:
    """Return the dimensions of a head whose rotary embedding rotates slowest."""
    half = head_dim // 2
    first = torch.arange(half - SLOW_PAIRS, half)
    return torch.cat([first, first + half])


@torch.no_grad()
def wire_copying(model: LlamaForCausalLM) -> None:
    """Overwrite the embeddings and some heads of the first two layers."""
    config: Any = model.config
    head_dim, width = int(config.head_dim), int(config.hidden_size)
    wire_embeddings(model)
    reading, writing = projection(head_dim, width), projection(head_dim, width)
    wire_previous_token(model, reading, writing)
    wire_matching(model, reading, writing)


def wire_embeddings(model: LlamaForCausalLM) -> None:
    """Give all embeddings the same length and a constant first component."""
    table = model.model.embed_tokens.weight
    width = table.shape[1]
    # With equal lengths the first component stays constant after normalization.
    directions = functional.normalize(torch.randn(table.shape[0], width - 1))
    table[:, 1:] = directions * SPREAD * width**0.5
    table[:, 0] = CONSTANT * SPREAD
    model.model.norm.weight.fill_(OUTPUT)


def wire_previous_token(
    model: LlamaForCausalLM, reading: torch.Tensor, writing: torch.Tensor
) -> None:
    """Make the first head of the first layer copy the previous token.

    Its scores depend on the distance alone and are highest at distance one. It reads a token with
    `reading` and writes it with `writing`, both [head_dim, width].
    """
    config: Any = model.config
    head_dim, width = reading.shape
    half = head_dim // 2
    inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(half) / half)
    level = CONSTANT / (1 + CONSTANT**2 / width) ** 0.5
    scale = (FOCUS**0.5) / level
    layer = model.model.layers[0].self_attn
    query, key = layer.q_proj.weight, layer.k_proj.weight
    query[:head_dim] = key[:head_dim] = 0.0
    query[:head_dim, 0] = scale * torch.cat([torch.cos(inv_freq), -torch.sin(inv_freq)])
    key[:half, 0] = scale
    layer.v_proj.weight[:head_dim] = reading
    layer.o_proj.weight[:, :head_dim] = SPREAD * 1.5 * writing.T


def wire_matching(model: LlamaForCausalLM, reading: torch.Tensor, writing: torch.Tensor) -> None:
    """Make one head of each key/value group of the second layer find the current token.

    It compares the current token with the previous token of every other position, which the first
    layer wrote with `writing`, and adds the token at that position to the output.
    """
    config: Any = model.config
    head_dim, width = reading.shape
    group = int(config.num_attention_heads) // int(config.num_key_value_heads)
    layer = model.model.layers[1].self_attn
    slow = slow_dimensions(head_dim)
    for index in range(config.num_key_value_heads):
        keys = slice(index * head_dim, (index + 1) * head_dim)
        heads = slice(index * group * head_dim, (index * group + 1) * head_dim)
        query = torch.zeros(head_dim, width)
        key = torch.zeros(head_dim, width)
        query[slow] = MATCH**0.5 * reading[: len(slow)]
        key[slow] = MATCH**0.5 * writing[: len(slow)]
        layer.q_proj.weight[heads], layer.k_proj.weight[keys] = query, key
        value = projection(head_dim, width)
        layer.v_proj.weight[keys] = value
        layer.o_proj.weight[:, heads] = SPREAD * 4.0 * value.T
