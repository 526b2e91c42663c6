"""Tiny random models that take images, and images as their processors make them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.architectures import ARCHITECTURES, Architecture
from engine.model.loading import auto_class
from engine.protocol.images import Image, ImageTensor

IMAGE_TOKEN = 500
_START, _END, _VIDEO_TOKEN = 501, 502, 503
_MERGE = 2  # patches of the Qwen models that make one token, in each direction


@dataclass(frozen=True, slots=True)
class Picture:
    """An image: what the encoder gets, by the names of transformers, and its number of tokens."""

    tensors: dict[str, Tensor]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of models that takes images.

    Attributes:
        architecture: its row in the table of architectures.
        picture: makes an image of random pixels: of a seed, a height and a width in tokens.
    """

    architecture: str
    picture: Callable[[int, int, int], Picture]

    def config(self) -> Any:
        """The configuration of a tiny model."""
        config = self._row.config
        config.image_token_id = config.image_token_index = IMAGE_TOKEN
        config.vision_start_token_id, config.vision_end_token_id = _START, _END
        config.video_token_id = _VIDEO_TOKEN
        return config

    def build(self) -> PreTrainedModel:
        """A random model, the same at every call, whose images weigh as much as its words."""
        config = self.config()
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.mul_(self._row.scale)
        model.generation_config.eos_token_id = None
        return model.eval()

    @property
    def _row(self) -> Architecture:
        (row,) = (one for one in ARCHITECTURES if one.name == self.architecture)
        return row


def _patches(patch: int) -> Callable[[int, int, int], Picture]:
    def make(seed: int, height: int, width: int) -> Picture:
        rows, columns = height * _MERGE, width * _MERGE
        values = torch.randn(rows * columns, 3 * 2 * patch**2, generator=_generator(seed))
        grid = torch.tensor([[1, rows, columns]])
        return Picture({"pixel_values": values, "image_grid_thw": grid}, height * width)

    return make


def _square(seed: int, _: int, __: int) -> Picture:
    """Of a LLaVA: every image has the same size."""
    pixels = torch.randn(1, 3, 28, 28, generator=_generator(seed))
    return Picture({"pixel_values": pixels}, 4)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FAMILIES = {
    "llava": Family("LLaVA", _square),
    "qwen2_vl": Family("Qwen 2 VL", _patches(14)),
    "qwen2_5_vl": Family("Qwen 2.5 VL", _patches(14)),
    "qwen3_vl": Family("Qwen 3 VL", _patches(16)),
    "qwen3_vl_moe": Family("Qwen 3 VL MoE", _patches(16)),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the images whose placeholders are among them."""

    token_ids: list[int]
    pictures: list[Picture]

    def images(self) -> tuple[Image, ...]:
        """The images as the engine gets them."""
        at = 0
        images = []
        for picture in self.pictures:
            at = self.token_ids.index(IMAGE_TOKEN, at)
            images.append(engine_image(picture, at))
            at += picture.num_tokens
        return tuple(images)

    @torch.inference_mode()
    def continued(self, model: Any, num_tokens: int) -> list[int]:
        """The likeliest continuation by transformers' generate."""
        ids = torch.tensor([self.token_ids])
        inputs: dict[str, Tensor] = {}
        for name in self.pictures[0].tensors if self.pictures else ():
            inputs[name] = torch.cat([picture.tensors[name] for picture in self.pictures])
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **inputs,
        )
        return [*output[0, len(self.token_ids) :].tolist()]


def engine_image(picture: Picture, start: int) -> Image:
    """An image whose placeholders begin at a position."""
    tensors = tuple(
        ImageTensor(name, str(value.dtype)[6:], tuple(value.shape), value.numpy().tobytes())
        for name, value in picture.tensors.items()
    )
    digest = hashlib.sha256(repr(tensors).encode()).digest()
    return Image(digest, ((start, picture.num_tokens),), tensors)


def prompt(*parts: list[int] | Picture) -> Prompt:
    """Tokens and images, one after the other, each image between its marks."""
    ids: list[int] = []
    pictures = []
    for part in parts:
        if isinstance(part, Picture):
            ids += [_START, *[IMAGE_TOKEN] * part.num_tokens, _END]
            pictures.append(part)
        else:
            ids += part
    return Prompt(ids, pictures)
