"""The part of a model that looks at images: which models have one that is served, and its seams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batch.model_input import ImageRows

# By transformers' names: models whose tokens were compared with those of transformers' generate.
# Others answer texts alone.
SERVED = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    }
)

# Why others are not, where more is known than that nobody has compared them.
_REASONS = {
    "gemma4": "an image's tokens see each other in layers with a window, and not in the others",
    "idefics2": "its processor joins the marks of images that stand side by side, and adds spaces",
}
# Of those served, those in which the tokens of an image see each other, the later ones included.
_BIDIRECTIONAL = frozenset({"gemma3"})
_DECODERS = ("language_model", "text_model")


def takes_images(model: PreTrainedModel) -> bool:
    """Whether images are served by a model."""
    return str(model.config.model_type) in SERVED and _decoder_name(model) is not None


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model answers texts alone; None if it takes images, or has no part for them."""
    if takes_images(model) or not hasattr(model.config, "vision_config"):
        return None
    kind = str(model.config.model_type)
    reason = _REASONS.get(kind, "they were not compared with those of transformers' generate")
    return f"{type(model).__name__} answers texts alone, and refuses images: {reason}"


def sees_whole_images(model: PreTrainedModel) -> bool:
    """Whether the tokens of an image see the later ones, so that they are computed in one step."""
    return str(model.config.model_type) in _BIDIRECTIONAL


def _decoder_name(model: PreTrainedModel) -> str | None:
    """The name of the part of a model that is for texts; None where that is the whole of it."""
    return next((name for name in _DECODERS if hasattr(model.base_model, name)), None)


def arguments(
    model: PreTrainedModel, input_ids: Tensor, positions: Tensor, images: ImageRows[Tensor]
) -> dict[str, Tensor]:
    """What a model gets in place of token ids: their embeddings, some of which are of images."""
    embeddings = model.get_input_embeddings()(input_ids)
    if len(images.rows):
        embeddings[images.rows] = images.embeddings.to(embeddings.dtype)
    places = positions if images.positions is None else images.positions.unsqueeze(1)
    return {
        "inputs_embeds": embeddings.unsqueeze(0),
        "position_ids": places.unsqueeze(0) if places.dim() == 1 else places,
    }


@contextmanager
def adding(model: PreTrainedModel, images: ImageRows[Tensor] | None) -> Iterator[None]:
    """While it is open, a model adds to its hidden states what images have for its first layers."""
    if images is None or not images.deepstack:
        yield
        return

    def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = torch.zeros(kwargs["inputs_embeds"].shape[:2], dtype=torch.bool)
        mask = mask.to(images.rows.device)
        mask[0, images.rows] = True
        added = {"visual_pos_masks": mask, "deepstack_visual_embeds": [*images.deepstack]}
        return args, {**kwargs, **added}

    name = _decoder_name(model)
    assert name is not None, "a model that takes images has a part for texts"
    decoder = getattr(model.base_model, name)
    hook = decoder.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def set_aside(model: PreTrainedModel, attention: str | None = None) -> Iterator[None]:
    """While it is open, the image part of a model that is served is not there.

    What makes the model faster leaves it as it is: the checks compare texts alone.

    Args:
        model: any.
        attention: what the image part's attention is computed by afterwards: it is not paged. None
            to leave that as it is.
    """
    parts = leave_out(model)
    for module in (module for part in parts.values() for module in part.modules()):
        if attention is not None and isinstance(module, PreTrainedModel):
            module.config._attn_implementation = attention
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(model.base_model, name, part)


def leave_out(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Removes the image part of a model that is served; others have none.

    Returns:
        What was removed, by its names in the base model.
    """
    if not takes_images(model):
        return {}
    base, decoder = model.base_model, _decoder_name(model)
    parts = {name: part for name, part in base.named_children() if name != decoder}
    for name in parts:
        setattr(base, name, nn.Identity())
    return parts
