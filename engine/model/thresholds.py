"""Lengths of a text from which on a model computes something else, by its configuration.

A chunk of attention, a window, a scale that grows with the position: a text that is shorter than
such a number cannot show whether the engine computes it rightly, and the self-check's is. So for
every number that texts can exceed, logits beyond it are compared as well: on a text of that length
where that takes little, or else on the self-check's with the number made small. What differs is
not served beyond that number.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..protocol.errors import ModelLoadError, first_line
from .loaded import LoadedModel
from .self_check import SELF_CHECK_TOKENS, difference_of_last, tolerance

logger = logging.getLogger(__name__)

# Fields of configurations with a number of tokens from which on something changes.
_FIELD = re.compile(
    r"(?:sliding_|attention_)?windows?(?:_size)?|sliding_window_size|attention_chunk_size"
    r"|floor_scale|index_topk|index_block_size|original_max_position_embeddings"
)
_SMALL = 8  # tokens: less than those of the self-check, and less than its first step
# Multiply-adds of a text's forward pass that are worth a check at every start, by device.
_WORTHWHILE = {"cpu": 5e10, "cuda": 5e14}


@dataclass(frozen=True, slots=True, order=True)
class Threshold:
    """A number of tokens, and the field of the configuration that has it."""

    num_tokens: int
    field: str


def find(text_config: Any) -> list[Threshold]:
    """The thresholds that the self-check's text does not exceed, the smallest first."""
    return sorted(
        {
            Threshold(number, ".".join(path))
            for path, number in _numbers(text_config.to_dict())
            if _FIELD.fullmatch(path[-1]) and number >= SELF_CHECK_TOKENS
        }
    )


def first_not_followed(loaded: LoadedModel, max_total_tokens: int) -> tuple[Threshold, str] | None:
    """The smallest threshold beyond which logits are not the model's own, and what was found.

    Args:
        loaded: the model, before any pass.
        max_total_tokens: of a text; thresholds from there on do not matter.
    """
    for threshold in find(loaded.model.config.get_text_config()):
        if threshold.num_tokens >= max_total_tokens:
            break
        reason = _objection(loaded, threshold)
        if reason is not None:
            return threshold, reason
    return None


def _objection(loaded: LoadedModel, threshold: Threshold) -> str | None:
    """Why the model cannot be served beyond a threshold; None if it can."""
    num_tokens = threshold.num_tokens + SELF_CHECK_TOKENS
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    num_tokens = min(num_tokens, positions or num_tokens)
    if _multiply_adds(loaded, num_tokens) <= _WORTHWHILE[loaded.device.type]:
        return _compared(loaded, num_tokens)
    with _made_small(loaded, threshold) as small:
        return _compared(small, SELF_CHECK_TOKENS)


def _compared(loaded: LoadedModel, num_tokens: int) -> str | None:
    """What a text of this length shows against the engine; None if nothing."""
    try:
        found = difference_of_last(loaded, num_tokens, loaded.stock_attention)
    except Exception as error:
        return f"it does not run there: {first_line(error)}"
    return None if found <= tolerance(loaded.dtype) else f"logits differ by {found:.2%} there"


def _multiply_adds(loaded: LoadedModel, num_tokens: int) -> float:
    """Of a forward pass: every weight with every token, and all pairs of tokens in attention."""
    text_config = loaded.model.config.get_text_config()
    num_weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    pairs = 2.0 * num_tokens**2 * text_config.hidden_size * text_config.num_hidden_layers
    return float(num_tokens * num_weights + pairs)


@contextmanager
def _made_small(loaded: LoadedModel, threshold: Threshold) -> Iterator[LoadedModel]:
    """Within it, configurations and layers have a small number in a threshold's place."""
    chunk_sizes = {
        layer: _SMALL if size == threshold.num_tokens else size
        for layer, size in loaded.chunk_sizes.items()
    }
    *_, name = threshold.field.split(".")
    with ExitStack() as stack:
        for module in loaded.model.modules():
            _replace_number(vars(module), threshold.num_tokens, stack)
            if (config := getattr(module, "config", None)) is not None:
                _replace_number(vars(config), threshold.num_tokens, stack, name)
        yield replace(loaded, chunk_sizes=chunk_sizes)


def _replace_number(
    values: dict[str, Any], number: int, stack: ExitStack, name: str | None = None
) -> None:
    """Replaces a number under one name, or all names of thresholds, until the stack unwinds."""
    for key, value in values.items():
        if isinstance(value, dict) and key.startswith("rope"):
            _replace_number(value, number, stack, name)
        elif value == number and (key == name if name else _FIELD.fullmatch(key)):
            stack.callback(values.__setitem__, key, value)
            values[key] = _SMALL


def _numbers(values: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], int]]:
    """The integers in nested dictionaries, and the names that lead to them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from (((name, *path), number) for path, number in _numbers(value))
        elif isinstance(value, int | float) and value == int(value):
            yield (name,), int(value)


def served_tokens(
    loaded: LoadedModel, max_total_tokens: int, *, is_asked: bool
) -> tuple[int, str | None]:
    """How many tokens a text may have, and why they are less than is wanted, if they are.

    Args:
        loaded: the model, before any pass.
        max_total_tokens: what is wanted.
        is_asked: whether it was asked for, and is not merely the default.

    Raises:
        ModelLoadError: less is served than was asked for.
    """
    found = first_not_followed(loaded, max_total_tokens)
    if found is None:
        return max_total_tokens, None
    threshold, reason = found
    text = (
        f"{type(loaded.model).__name__} is served up to {threshold.field} "
        f"({threshold.num_tokens} tokens): {reason}"
    )
    if is_asked:
        raise ModelLoadError(
            f"max_total_tokens must be <= {threshold.num_tokens}. {text}. Given: {max_total_tokens}"
        )
    logger.warning("%s", text)
    return threshold.num_tokens, text
