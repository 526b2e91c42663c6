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
from transformers import AutoConfig

from ..workers.serving import serve
from .expansion import Checkpoint, Expand, family_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DTYPES = {"f": "float32", "i": "int64", "b": "bool"}

Answer = dict[str, Any]


class Processor(NamedTuple):
    """The model's processor.

    Attributes:
        expand: makes tokens and tensors of an image.
        mark: the token of a prompt that an image's tokens replace.
        mark_text: how a prompt spells it.
        shown: the tokens that a template writes for an image, the mark among them.
        placeholder: the token in whose place the encoder's results are put.
    """

    expand: Expand
    mark: int
    mark_text: str
    shown: list[int]
    placeholder: int

    def answer(self, request: dict[str, Any]) -> Answer:
        """An image's tokens and tensors, or what is wrong with it."""
        try:
            image = decoded(request["data"], request["max_pixels"])
            made = self.expand(image, request["num_images"])
        except MemoryError:
            return {"error": "needs too much memory to decode"}
        except ValueError as error:
            return {"error": str(error).splitlines()[0]}
        packed = [_packed(name, np.asarray(value)) for name, value in sorted(made.tensors.items())]
        digest = hashlib.sha256(repr([part[:3] for part in packed]).encode())
        for part in packed:
            digest.update(part[3])
        spans = list(_spans(made.token_ids, self.placeholder))
        return {
            "ids": made.token_ids,
            "around": [made.before, made.after],
            "mark": self.mark,
            "mark_text": self.mark_text,
            "shown": self.shown,
            "image": [digest.digest(), spans, packed],
        }


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


def start(setup: list[Any]) -> Callable[[dict[str, Any]], Answer]:
    """Loads the processor: `setup` is the model, its revision, and whether its code may run."""
    model_id, revision, trusted = setup
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # pixels are counted here
    common = {"revision": revision, "trust_remote_code": trusted}
    config = AutoConfig.from_pretrained(model_id, **common)
    checkpoint = Checkpoint(model_id, config, common)
    family = family_of(checkpoint)
    mark_text = checkpoint.tokenizer().convert_ids_to_tokens(family.mark)
    return Processor(
        expand=family.expand,
        mark=family.mark,
        mark_text=mark_text,
        shown=family.shown,
        placeholder=checkpoint.placeholder,
    ).answer


if __name__ == "__main__":
    serve(start)
