"""The bundled model as transformers computes it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.paths import DEMO_MODEL
from tests.service.fakes import raw_tokenizer


@cache
def reference() -> Any:
    """The bundled model as transformers computes it."""
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


def ids_of(text: str) -> list[int]:
    return list(raw_tokenizer().encode(text).ids)


@torch.inference_mode()
def scores(token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token at each place: row i is what follows token i."""
    return torch.as_tensor(reference()(torch.tensor([token_ids])).logits[0].log_softmax(-1))
