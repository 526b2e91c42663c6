"""Tiny random models that take images, and images as their processors make them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.architectures import ARCHITECTURES, Architecture
from engine.model.outline import auto_class
from engine.protocol.config import EngineConfig
from engine.protocol.images import Image, ImageTensor

BLOCK_SIZE = 8
IMAGE_TOKEN = 500
_START, _END, _VIDEO_TOKEN, _BREAK, _TILE = 501, 502, 503, 504, 505
_MERGE = 2  # patches of some models that make one token, in each direction
_PATCH = 14  # pixels
_TILE_SIDE = 56  # likewise
_TILE_TOKENS = 4

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image: what the encoder gets, by the names of transformers, and its tokens in a prompt."""

    tensors: Tensors
    token_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Its placeholders."""
        return self.token_ids.count(IMAGE_TOKEN)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of models that takes images.

    Attributes:
        architecture: its row in the table of architectures.
        picture: makes an image of random pixels: of a seed, a height and a width in tokens.
        options: what differs from the configuration in the table.
        text: likewise, of the part for texts.
        vision: likewise, of the image part.
        types: the argument of transformers that says which tokens are of images, if there is one.
        step_tokens: the most tokens of a step; fewer than some images have, where they may be.
        max_num_seqs: the most sequences that run together.
    """

    architecture: str
    picture: Callable[[int, int, int], Picture]
    options: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    types: str | None = None
    step_tokens: int = 16
    max_num_seqs: int = 256

    def config(self) -> Any:
        """The configuration of a tiny model."""
        row = self._row
        vision = {**(row.vision or {}), **self.vision}
        config = replace(row, options={**row.options, **self.text}, vision=vision).config
        config.image_token_id = config.image_token_index = IMAGE_TOKEN
        config.vision_start_token_id, config.vision_end_token_id = _START, _END
        config.video_token_id = _VIDEO_TOKEN
        for name, value in self.options.items():
            setattr(config, name, value)
        return config

    def build(self, config: Any = None) -> PreTrainedModel:
        """A random model, the same at every call, whose images weigh as much as its words."""
        config = config or self.config()
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if not parameter.any():  # transformers leaves these to the checkpoint
                parameter.data.normal_(std=0.02)
            parameter.data.mul_(self._row.scale)
            if name.endswith("mm_soft_emb_norm.weight"):
                parameter.data.add_(1)
        model.generation_config.eos_token_id = None
        return model.eval()

    def engine_config(self, folder: Path) -> EngineConfig:
        """Settings for a checkpoint of it, whose images are computed in several steps if they may.

        Args:
            folder: of the checkpoint.
        """
        return EngineConfig(
            model_id=str(folder),
            socket_path=folder / "unused.sock",
            device="cpu",
            block_size=BLOCK_SIZE,
            max_total_tokens=128,
            max_batch_total_tokens=512,
            max_step_tokens=self.step_tokens,
            max_num_seqs=self.max_num_seqs,
            num_threads=1,
        )

    @property
    def _row(self) -> Architecture:
        (row,) = (one for one in ARCHITECTURES if one.name == self.architecture)
        return row


def _patches(patch: int) -> Callable[[int, int, int], Picture]:
    def make(seed: int, height: int, width: int) -> Picture:
        rows, columns = height * _MERGE, width * _MERGE
        values = torch.randn(rows * columns, 3 * 2 * patch**2, generator=_generator(seed))
        grid = torch.tensor([[1, rows, columns]])
        tensors = {"pixel_values": values, "image_grid_thw": grid}
        return Picture(tensors, (IMAGE_TOKEN,) * (height * width))

    return make


def _square(side: int, num_tokens: int) -> Callable[[int, int, int], Picture]:
    """Of models for which every image has the same size."""

    def make(seed: int, _: int, __: int) -> Picture:
        tensors = {"pixel_values": _pixels(seed, 1, 3, side, side)}
        return Picture(tensors, (IMAGE_TOKEN,) * num_tokens)

    return make


def _rows_of_tokens(merge: int) -> Callable[[int, int, int], Picture]:
    """Of Pixtral: rows of tokens with a break between them."""

    def make(seed: int, height: int, width: int) -> Picture:
        size = [height * merge * _PATCH, width * merge * _PATCH]
        tensors = {"pixel_values": _pixels(seed, 1, 3, *size), "image_sizes": torch.tensor([size])}
        row = (*[IMAGE_TOKEN] * width, _BREAK)
        return Picture(tensors, (*(row * height)[:-1], _END))

    return make


def _tiles_with_marks(seed: int, height: int, width: int) -> Picture:
    """Of Idefics 3: parts of an image in rows, and the whole of it, each behind its mark."""
    num_tiles = height // 2 * (width // 2) + 1
    tensors = {
        "pixel_values": _pixels(seed, 1, num_tiles, 3, _TILE_SIDE, _TILE_SIDE),
        "pixel_attention_mask": torch.ones(1, num_tiles, _TILE_SIDE, _TILE_SIDE, dtype=torch.int64),
    }
    tile = (_TILE, _TILE + 1, *[IMAGE_TOKEN] * _TILE_TOKENS)
    return Picture(tensors, (*tile * num_tiles, _TILE))


def _tiles(seed: int, height: int, width: int) -> Picture:
    """Of InternVL: parts of an image without a mark between them."""
    num_tiles = height * width // _TILE_TOKENS
    tensors = {"pixel_values": _pixels(seed, num_tiles, 3, _TILE_SIDE, _TILE_SIDE)}
    return Picture(tensors, (IMAGE_TOKEN,) * (num_tiles * _TILE_TOKENS))


def _any_resolution(name: str) -> Callable[[int, int, int], Picture]:
    """Of LLaVA-NeXT: parts of an image, of which the margins are left out, with ends of lines."""

    def make(seed: int, height: int, width: int) -> Picture:
        size = torch.tensor([[10 * height, 10 * width]])
        parts = {(40, 60): 5, (20, 30): 3}.get((10 * height, 10 * width), 5)
        tensors = {"pixel_values": _pixels(seed, 1, parts, 3, 28, 28), "image_sizes": size}
        output = _model(name).get_image_features(**tensors, return_dict=True)
        return Picture(tensors, (IMAGE_TOKEN,) * len(output.pooler_output[0]))

    return make


@cache
def _model(name: str) -> Any:
    return FAMILIES[name].build()


def _pixels(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_ANY = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
_TILED = {"image_size": _TILE_SIDE}

FAMILIES = {
    "llava": Family("LLaVA", _square(28, 4)),
    "qwen2_vl": Family("Qwen 2 VL", _patches(14), types="mm_token_type_ids"),
    "qwen2_5_vl": Family("Qwen 2.5 VL", _patches(14), types="mm_token_type_ids"),
    "qwen3_vl": Family("Qwen 3 VL", _patches(16), types="mm_token_type_ids"),
    "qwen3_vl_moe": Family("Qwen 3 VL MoE", _patches(16), types="mm_token_type_ids"),
    "gemma3": Family(
        "Gemma 3 with images",
        _square(_TILE_SIDE, 16),
        options={"mm_tokens_per_image": 16},
        text={"sliding_window": 12},  # an image's last token does not see its first
        vision=_TILED,
        types="token_type_ids",
        step_tokens=24,
        max_num_seqs=9,
    ),
    "mistral3": Family(
        "Mistral Small 3.1 with images", _rows_of_tokens(2), vision={"image_size": 168}
    ),
    "pixtral": Family(
        "LLaVA",
        _rows_of_tokens(1),
        options={"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        vision={"model_type": "pixtral", "head_dim": 16, "image_size": 168},
    ),
    "idefics3": Family("Idefics 3", _tiles_with_marks, vision=_TILED),
    "smolvlm": Family("SmolVLM", _tiles_with_marks, vision=_TILED),
    "llava_next": Family("LLaVA-NeXT", _any_resolution("llava_next"), options=_ANY),
    "llava_onevision": Family(
        "LLaVA-OneVision",
        _any_resolution("llava_onevision"),
        options={**_ANY, "vision_feature_select_strategy": "full"},
    ),
    "internvl": Family("InternVL 3", _tiles, vision=_TILED),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the images whose placeholders are among them, with the places of these."""

    token_ids: list[int]
    pictures: list[Picture]
    starts: list[int]

    def images(self) -> tuple[Image, ...]:
        """The images as the engine gets them."""
        return tuple(map(engine_image, self.pictures, self.starts))

    @torch.inference_mode()
    def continued(self, model: Any, num_tokens: int, types: str | None = None) -> list[int]:
        """The likeliest continuation by transformers' generate; `types` as in `Family`."""
        ids = torch.tensor([self.token_ids])
        inputs = together([picture.tensors for picture in self.pictures])
        if types is not None:
            inputs[types] = (ids == IMAGE_TOKEN).int()
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **inputs,
        )
        return [*output[0, len(self.token_ids) :].tolist()]


def together(images: Sequence[Tensors]) -> Tensors:
    """Tensors of several images as a processor makes them: smaller ones are filled up with 0.

    Models with a number of parts have one row for a prompt, and all parts of all images in it.
    """
    found = {}
    for name in images[0] if images else ():
        parts = [tensors[name] for tensors in images]
        dimension = 1 if "pixel_attention_mask" in images[0] else 0
        shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
        found[name] = torch.cat([_filled(part, shape, dimension) for part in parts], dimension)
    return found


def _filled(part: Tensor, shape: list[int], along: int) -> Tensor:
    """A tensor as large as this one, but for the dimension along which it is put to others."""
    margins = [0 if i == along else shape[i] - part.shape[i] for i in range(part.dim())]
    return F.pad(part, [size for margin in reversed(margins) for size in (0, margin)])


def engine_image(picture: Picture, start: int) -> Image:
    """An image whose tokens begin at a position."""
    tensors = tuple(
        ImageTensor(name, str(value.dtype)[6:], tuple(value.shape), value.numpy().tobytes())
        for name, value in picture.tensors.items()
    )
    spans = []
    for token_id, run in groupby(picture.token_ids):
        length = len(list(run))
        if token_id == IMAGE_TOKEN:
            spans.append((start, length))
        start += length
    return Image(hashlib.sha256(repr(tensors).encode()).digest(), tuple(spans), tensors)


def prompt(*parts: list[int] | Picture) -> Prompt:
    """Tokens and images, one after the other, each image between its marks."""
    ids: list[int] = []
    pictures, starts = [], []
    for part in parts:
        if isinstance(part, Picture):
            starts.append(len(ids) + 1)
            ids += [_START, *part.token_ids, _END]
            pictures.append(part)
        else:
            ids += part
    return Prompt(ids, pictures, starts)
