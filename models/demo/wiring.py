"""An initialization that gives a fresh model a rough copying circuit in its first two layers.

Small models need many million tokens before attention heads that copy ("induction heads") appear
by themselves. Here a head of the first layer starts by looking at the previous token, and the
heads of the second layer by looking for places whose previous token is the current one. Training
refines all of it; no weight is frozen.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

SPREAD = 0.15  # standard deviation of the embeddings, large so that early steps cannot undo it
CONSTANT = 6.0  # size of the constant embedding component, in standard deviations
FOCUS = 60.0  # how sharply the first head looks at the previous token
MATCH = 4.5  # how sharply the second layer looks for equal tokens
OUTPUT = 0.35  # weight of the last norm, which keeps the first logits moderate
SLOW_PAIRS = 18  # rotary pairs too slow to disturb a match within a few hundred tokens


def projection(rows: int, columns: int) -> torch.Tensor:
    """Return a random matrix with orthonormal rows that ignores the constant component."""
    matrix = torch.linalg.qr(torch.randn(columns - 1, rows)).Q.T
    return torch.cat([torch.zeros(rows, 1), matrix], dim=1)


def slow_dimensions(head_dim: int) -> torch.Tensor:
    """Return the dimensions of a head that turn slowest with the distance."""
    half = head_dim // 2
    first = torch.arange(half - SLOW_PAIRS, half)
    return torch.cat([first, first + half])


@torch.no_grad()
def wire_copying(model: LlamaForCausalLM) -> None:
    """Overwrite the embeddings and some heads of the first two layers."""
    config: Any = model.config
    head_dim, width = int(config.head_dim), int(config.hidden_size)
    group = int(config.num_attention_heads) // int(config.num_key_value_heads)
    table = model.model.embed_tokens.weight
    # Rows of equal length: the first component must stay constant after normalization.
    directions = functional.normalize(torch.randn(table.shape[0], width - 1))
    table[:, 1:] = directions * SPREAD * width**0.5
    table[:, 0] = CONSTANT * SPREAD
    model.model.norm.weight.fill_(OUTPUT)
    level = CONSTANT / (1 + CONSTANT**2 / width) ** 0.5

    # First layer: scores that depend on the distance alone, highest at distance one.
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    half = head_dim // 2
    angle = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(half) / half)
    scale = (FOCUS**0.5) / level
    query, key = first.q_proj.weight, first.k_proj.weight
    query[:head_dim] = key[:head_dim] = 0.0
    query[:head_dim, 0] = scale * torch.cat([torch.cos(angle), -torch.sin(angle)])
    key[:half, 0] = scale
    reading, writing = projection(head_dim, width), projection(head_dim, width)
    first.v_proj.weight[:head_dim] = reading
    first.o_proj.weight[:, :head_dim] = SPREAD * 1.5 * writing.T

    # Second layer: compare the own token with the previous token of every other place, and
    # add the token found there to the output.
    slow = slow_dimensions(head_dim)
    for index in range(config.num_key_value_heads):
        keys = slice(index * head_dim, (index + 1) * head_dim)
        heads = slice(index * group * head_dim, (index * group + 1) * head_dim)
        query = torch.zeros(head_dim, width)
        key = torch.zeros(head_dim, width)
        query[slow] = MATCH**0.5 * reading[: len(slow)]
        key[slow] = MATCH**0.5 * writing[: len(slow)]
        second.q_proj.weight[heads], second.k_proj.weight[keys] = query, key
        value = projection(head_dim, width)
        second.v_proj.weight[keys] = value
        second.o_proj.weight[:, heads] = SPREAD * 4.0 * value.T
