"""How many tokens of long texts a GiB of KV cache holds, with and without blocks for windows.

Arithmetic on the shapes of published models, with bfloat16 and blocks of 16 tokens, through the
functions with which an engine sizes its cache; nothing is allocated.

    .venv/bin/python -m benchmarks.windows

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import torch

from engine.attention.kv_cache import LayerShape, bytes_per_block
from engine.block_form import choose_form
from engine.memory.cache_size import most_tokens

_GIB = 2**30
_BLOCK_SIZE = 16
_LENGTHS = (4096, 32_768, 131_072)
_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Model:
    """Layers of a published model: those that see everything, those with a window, and its size."""

    name: str
    num_whole: int
    num_windowed: int
    window: int
    shape: LayerShape

    def tokens(self, length: int, *, windowed: bool) -> int:
        """Tokens of texts of a length that a GiB holds."""
        form = choose_form(
            num_whole=self.num_whole,
            num_windowed=self.num_windowed,
            window=self.window,
            block_size=_BLOCK_SIZE,
            max_total_tokens=length,
        )
        form = form if windowed else None
        layers = dict.fromkeys(range(self.num_whole + self.num_windowed), self.shape)
        num_blocks = _GIB // bytes_per_block(layers, _BLOCK_SIZE, _DTYPE, form)
        return most_tokens(num_blocks, _BLOCK_SIZE, length, form)


MODELS = (
    Model("Gemma 3 1B", 4, 22, 512, LayerShape(1, 256, 256)),
    Model("Gemma 3 4B", 5, 29, 1024, LayerShape(4, 256, 256)),
    Model("Gemma 3 12B", 8, 40, 1024, LayerShape(8, 256, 256)),
    Model("Gemma 3 27B", 10, 52, 1024, LayerShape(16, 128, 128)),
    Model("gpt-oss 20B", 12, 12, 128, LayerShape(8, 64, 64)),
    Model("Command R7B", 8, 24, 4096, LayerShape(8, 128, 128)),
    Model("Llama 4 Scout", 12, 36, 8192, LayerShape(8, 128, 128)),
)


def main() -> None:
    """Prints a table, and the same as JSON."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(
        "| model | texts of | tokens per GiB before | with windows | times |\n|---|---|---|---|---|"
    )
    figures = []
    for model in MODELS:
        for length in _LENGTHS:
            before, after = (model.tokens(length, windowed=with_) for with_ in (False, True))
            figures.append(
                {"model": model.name, "length": length, "before": before, "after": after}
            )
            times = f"{after / before:.1f}"
            print(f"| {model.name} | {length:,} | {before:,} | {after:,} | {times} |")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
