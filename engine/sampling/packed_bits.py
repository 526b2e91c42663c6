"""Expands rows of one bit per token into numbers to add to scores: for watermarks and grammars.

Bit i % 8 of byte i // 8 is token i's. One look-up gives eight columns, which is faster than to
unpack, convert and multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor


def byte_table(if_set: float, if_clear: float, device: torch.device) -> Tensor:
    """Float32 [256, 8]: what each bit of each byte adds to a score."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return torch.where(bits.bool(), if_set, if_clear).to(device, torch.float32)


def spread(packed: Tensor, table: Tensor, num_columns: int) -> Tensor:
    """Float32 [num_rows, num_columns] of uint8 [num_rows, at least ceil(num_columns / 8)]."""
    return torch.nn.functional.embedding(packed.int(), table).flatten(1)[:, :num_columns]
