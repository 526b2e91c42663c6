"""Encodes images with the model's own encoder, and keeps the results by the images' digests."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..protocol.images import Image, ImageTensor

_DTYPES = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}
_GRID = "image_grid_thw"  # patches of an image in time, height and width


class Embeddings(NamedTuple):
    """What the encoder made of an image, on the host.

    `tokens` [num_tokens, hidden_size] are for its placeholders; `deepstack` has as much for each
    of the first layers, in models that add that to their hidden states.
    """

    tokens: Tensor
    deepstack: tuple[Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """The memory they take."""
        return sum(part.nbytes for part in (self.tokens, *self.deepstack))


class ImageEncoder:
    """The image part of a model.

    Args:
        model: with an image part.
        max_bytes: of the results that are kept; the last one always is.

    Attributes:
        num_encoded: images that were encoded so far.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int) -> None:
        self._model: Any = model
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Embeddings] = OrderedDict()
        self._num_bytes = 0
        self.num_encoded = 0

    def has(self, digest: bytes) -> bool:
        """Whether an image is encoded already."""
        return digest in self._kept

    @torch.inference_mode()
    def encode(self, image: Image) -> Embeddings:
        """The embeddings of an image, computed unless they are kept.

        Raises:
            ValueError: there are not as many as placeholders.
        """
        found = self._kept.get(image.digest)
        if found is None:
            found = self._computed(image)
            self._keep(image.digest, found)
        self._kept.move_to_end(image.digest)
        if len(found.tokens) != image.num_tokens:
            raise ValueError(
                f"the encoder made {len(found.tokens)} embeddings for {image.num_tokens} tokens"
            )
        return found

    @torch.inference_mode()
    def positions(self, token_ids: list[int], images: tuple[Image, ...]) -> Tensor | None:
        """Three positions for each token of a prompt, int64 [3, num_tokens] on the host.

        None for models that have one position per token.
        """
        base = self._model.base_model
        if not hasattr(base, "get_rope_index"):
            return None
        kinds = torch.zeros(1, len(token_ids), dtype=torch.int32)
        for image in images:
            for start, length in image.spans:
                kinds[0, start : start + length] = 1
        grids = [_tensor(part) for image in images for part in image.tensors if part.name == _GRID]
        positions, _ = base.get_rope_index(
            torch.tensor([token_ids]), mm_token_type_ids=kinds, image_grid_thw=torch.cat(grids)
        )
        assert isinstance(positions, Tensor)
        return positions[:, 0]

    def _computed(self, image: Image) -> Embeddings:
        device, dtype = self._model.device, self._model.dtype
        arguments = {}
        for part in image.tensors:
            values = _tensor(part).to(device)
            arguments[part.name] = values.to(dtype) if values.is_floating_point() else values
        output = self._model.get_image_features(**arguments, return_dict=True)
        self.num_encoded += 1
        deepstack = getattr(output, "deepstack_features", None) or ()
        return Embeddings(_rows(output.pooler_output), tuple(map(_rows, deepstack)))

    def _keep(self, digest: bytes, embeddings: Embeddings) -> None:
        self._kept[digest] = embeddings
        self._num_bytes += embeddings.num_bytes
        while self._num_bytes > self._max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= dropped.num_bytes


def _tensor(part: ImageTensor) -> Tensor:
    values: NDArray[Any] = np.frombuffer(part.data, dtype=_DTYPES[part.dtype]).reshape(part.shape)
    return torch.from_numpy(values.copy())


def _rows(output: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """[num_tokens, hidden_size] of what an encoder returns: one tensor, or several."""
    parts = [output] if isinstance(output, Tensor) else output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).cpu()
