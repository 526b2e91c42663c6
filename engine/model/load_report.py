"""What transformers reports of a checkpoint's tensors: those that are missing, and those left out.

It only warns of them, and the model would run with random weights, or without layers or scales.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import gguf
from torch import nn

_MAX_LISTED = 3
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LAYER = re.compile(r".*?\.\d+(?=\.)")


def check_report(report: dict[str, Any], model: nn.Module, *, is_quantized: bool) -> None:
    """Checks that a model has all its weights, and that none of its layers' were left out.

    Args:
        report: what transformers gives for `output_loading_info`.
        model: what it has loaded.
        is_quantized: whether the model is, so that its layers have tensors of their own.

    Raises:
        ValueError: a tensor is missing, left out or of a wrong shape; the text names it.
    """
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise ValueError(
            f"{name} has shape {list(found)}, and by its configuration {list(wanted)}; "
            f"wrong shapes: {len(report['mismatched_keys'])}"
        )
    if report["missing_keys"]:
        raise ValueError(f"the checkpoint lacks {_listed(report['missing_keys'])}")
    left_out = [] if is_quantized else _left_out(report["unexpected_keys"], model)
    if left_out:
        raise ValueError(
            "config.json does not fit the weights: the model that it describes leaves out "
            f"{_listed(left_out)}"
        )


def check_gguf_biases(path: str, model: nn.Module) -> None:
    """Checks that a model has as many biases as the GGUF file that it was made of.

    Of tensors that it leaves out of such a file, transformers reports nothing. A Llama's file may
    have biases, for example, of which its configuration says nothing.

    Raises:
        ValueError: the file has more; the text names the first.
    """
    found = {
        tensor.name: int(tensor.n_elements)
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name.endswith(".bias")
    }
    held = [*model.named_parameters(), *model.named_buffers()]
    if sum(found.values()) > sum(part.numel() for name, part in held if name.endswith("bias")):
        raise ValueError(f"the model leaves out biases of the file, which has {_listed(found)}")


def _left_out(unexpected: Collection[str], model: nn.Module) -> list[str]:
    """Tensors that belong to a layer that the model has, or to one more of the same kind.

    The scales or the bias of a linear layer, for example, or layers above the number of them in the
    configuration. What models go without on purpose are parts of another kind: for images, or to
    predict several tokens.
    """
    modules = dict(model.named_modules())
    alike = {_any_layer(name): module for name, module in modules.items()}
    buffers = {_any_layer(name) for name, _ in model.named_buffers()}
    of_another_kind = {_layer(name) for name in unexpected if _any_layer(_owner(name)) not in alike}

    def owner(name: str) -> nn.Module | None:
        if _layer(name) in modules:
            return modules.get(_owner(name))
        return None if _layer(name) in of_another_kind else alike.get(_any_layer(_owner(name)))

    return [
        name
        for name in unexpected
        if _any_layer(name) not in buffers and _is_innermost(owner(name))
    ]


def _is_innermost(module: nn.Module | None) -> bool:
    """Whether it has weights, and no modules of its own."""
    return module is not None and not [*module.children()] and bool([*module.parameters()])


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _layer(name: str) -> str:
    """A name up to its first number; empty, as the whole model's, where there is none."""
    match = _LAYER.match(name)
    return match[0] if match else ""


def _any_layer(name: str) -> str:
    return _NUMBER.sub("#", name)


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(sorted(names)[:_MAX_LISTED]) + more
