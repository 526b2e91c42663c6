"""`python -m service.images.worker`: the process that decodes images, without torch.

Pillow reads a file, and the model's own image processor makes tensors of it and says which tokens
stand for it in a prompt.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import groupby
from typing import Any, NamedTuple

os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that there is no torch
if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

from ..workers.serving import serve

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DTYPES = {"f": "float32", "i": "int64", "b": "bool"}
_TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_GRID = "image_grid_thw"

Answer = dict[str, Any]
# Makes of an image the ids of its tokens, and the tensors that the encoder takes.
Process = Callable[[Image.Image], tuple[list[int], dict[str, Any]]]


class Processor(NamedTuple):
    """The model's processor.

    Attributes:
        process: of an image.
        mark: the token of a prompt that an image's tokens replace.
        shown: the tokens that a template writes for an image, the mark among them.
        placeholder: the token in whose place the encoder's results are put.
    """

    process: Process
    mark: int
    shown: list[int]
    placeholder: int

    def answer(self, request: dict[str, Any]) -> Answer:
        """An image's tokens and tensors, or what is wrong with it."""
        try:
            image = decoded(request["data"], request["max_pixels"])
            token_ids, tensors = self.process(image)
        except MemoryError:
            return {"error": "needs too much memory to decode"}
        except ValueError as error:
            return {"error": str(error).splitlines()[0]}
        packed = [_packed(name, np.asarray(value)) for name, value in sorted(tensors.items())]
        digest = hashlib.sha256(repr([part[:3] for part in packed]).encode())
        for part in packed:
            digest.update(part[3])
        spans = list(_spans(token_ids, self.placeholder))
        packed_image = [digest.digest(), spans, packed]
        return {"ids": token_ids, "mark": self.mark, "shown": self.shown, "image": packed_image}


def decoded(data: bytes, max_pixels: int) -> Image.Image:
    """The first picture of a file, in red, green and blue.

    Raises:
        ValueError: it cannot be read, or has too many pixels, which is known before it is decoded.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"must have at most {max_pixels} pixels. Given: {width} x {height}")
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"is not an image in one of the formats {', '.join(FORMATS)}") from None
    except (ValueError, MemoryError):
        raise
    except Exception:  # decoders raise anything at files that lie
        raise ValueError("is an image that cannot be decoded") from None


def _packed(name: str, values: Any) -> tuple[str, str, tuple[int, ...], bytes]:
    dtype = _DTYPES[values.dtype.kind]
    return name, dtype, values.shape, np.ascontiguousarray(values, dtype).tobytes()


def _spans(token_ids: list[int], placeholder: int) -> Iterator[tuple[int, int]]:
    """Where placeholders stand: runs of them, each a position and a number."""
    start = 0
    for token_id, run in groupby(token_ids):
        length = len(list(run))
        if token_id == placeholder:
            yield start, length
        start += length


def _grids(model_id: str, common: dict[str, Any], placeholder: int) -> Process:
    """For the Qwen models: their processors need a library for videos, images do not."""
    load: Any = AutoImageProcessor.from_pretrained
    images = load(model_id, backend="pil", **common)

    def process(image: Image.Image) -> tuple[list[int], dict[str, Any]]:
        made = dict(images(images=[image], return_tensors="np"))
        num_tokens = int(made[_GRID].prod()) // images.merge_size**2
        return [placeholder] * num_tokens, made

    return process


def _expanding(model_id: str, common: dict[str, Any]) -> tuple[Process, int]:
    """What a processor makes of its own mark and an image, and the mark."""
    load: Any = AutoProcessor.from_pretrained
    whole = load(model_id, **common)
    mark = whole.image_token

    def process(image: Image.Image) -> tuple[list[int], dict[str, Any]]:
        made = dict(whole(text=mark, images=[image], add_special_tokens=False, return_tensors="np"))
        token_ids = [int(index) for index in made["input_ids"][0]]
        return token_ids, {key: made[key] for key in made.keys() - _TEXT_INPUTS}

    return process, int(whole.tokenizer.convert_tokens_to_ids(mark))


def start(setup: list[Any]) -> Callable[[dict[str, Any]], Answer]:
    """Loads the processor: `setup` is the model, its revision, and whether its code may run."""
    model_id, revision, trusted = setup
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # pixels are counted here
    common = {"revision": revision, "trust_remote_code": trusted}
    config = AutoConfig.from_pretrained(model_id, **common)
    placeholder = getattr(config, "image_token_id", None)
    placeholder = config.image_token_index if placeholder is None else placeholder
    if config.model_type.startswith("qwen"):
        process = _grids(model_id, common, placeholder)
        shown = [config.vision_start_token_id, placeholder, config.vision_end_token_id]
        return Processor(process, placeholder, shown, placeholder).answer
    process, mark = _expanding(model_id, common)
    return Processor(process, mark, [mark], placeholder).answer


if __name__ == "__main__":
    serve(start)
