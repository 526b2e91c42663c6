"""A model that is divided among ranks computes what it computed as a whole, or is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..shards.cut import Cut
from ..shards.divide import divide
from ..shards.group import Group
from . import image_part
from .self_check import relative_difference, stock_logits, tolerance

logger = logging.getLogger(__name__)

_MAX_TRIED = 8  # numbers of ranks that are tried where another one was asked for


def check_divisible(model_config: Any) -> None:
    """Checks that a checkpoint has weights that can be divided.

    Those of compressed-tensors are dequantised while they are loaded, on GPUs too. So there are no
    groups that a division could cut; `model_config` is changed accordingly.

    Raises:
        ValueError: it is quantised, and its weights stay packed.
    """
    described = getattr(model_config, "quantization_config", None)
    if described is None:
        return
    described = described if isinstance(described, dict) else described.to_dict()
    method = described.get("quant_method")
    if method != "compressed-tensors":
        raise ValueError(
            f"the checkpoint is quantised already ({method}), and its packed weights are not "
            "divided among ranks: take one of compressed-tensors, a GGUF file, or one in full "
            "precision, with --quantize"
        )
    others = {name: it for name, it in described.items() if name != "use_optimized_inference"}
    model_config.quantization_config = others | {"dequantize": True}


def divided_weights(make: Callable[[], PreTrainedModel], num_ranks: int) -> int:
    """How many weights each rank of a model has, without those of an image part.

    Args:
        make: makes the model, whose weights may have shapes alone.
        num_ranks: among which it is divided.

    Raises:
        ValueError: it cannot be divided among so many; the text says which numbers would do.
    """
    try:
        return _divided(make(), num_ranks)
    except ValueError as error:
        raise ValueError(f"{error}; {_advice(make, num_ranks)}") from error


def _advice(make: Callable[[], PreTrainedModel], num_ranks: int) -> str:
    """What to do where a model cannot be divided among so many ranks."""
    tried = range(2, max(num_ranks, _MAX_TRIED) + 1)
    possible = [str(number) for number in tried if _is_divided(make(), number)]
    if not possible:
        return "--num-shard 1 serves it whole, and --replicas several times"
    return f"it can be divided by --num-shard {' or '.join(possible)}"


def _is_divided(model: PreTrainedModel, num_ranks: int) -> bool:
    try:
        _divided(model, num_ranks)
    except ValueError:
        return False
    return True


def _divided(model: PreTrainedModel, num_ranks: int) -> int:
    with image_part.set_aside(model):
        divide(model, Group(0, num_ranks, _nothing_to_gather))
        return sum(parameter.numel() for parameter in model.parameters())


def _nothing_to_gather(_: Tensor) -> Tensor:
    raise NotImplementedError("weights without values compute nothing")


def divide_checked(model: PreTrainedModel, group: Group) -> dict[str, Cut]:
    """Divides a model on the host among the ranks, and compares its logits with the whole model's.

    The first rank keeps the image part of a model that takes images whole, the others have none.

    Returns:
        This rank's parts of linear layers, by their names.

    Raises:
        ValueError: it cannot be divided, or then computes something else.
    """
    expected = stock_logits(model) if group.rank == 0 else None
    with image_part.set_aside(model):
        cuts = divide(model, group)
        whole = sum(parameter.numel() for parameter in model.parameters())
    logger.info("rank %d of %d has %.1f million weights", group.rank, group.size, whole / 1e6)
    if group.rank > 0:
        image_part.leave_out(model)
    actual = stock_logits(model)
    if expected is None:
        return cuts
    difference = relative_difference(actual, expected)
    if not difference <= tolerance(model.dtype):  # also when it is not a number
        raise ValueError(
            f"{type(model).__name__} cannot be divided among ranks: its logits then differ by "
            f"{difference:.2%}"
        )
    return cuts
