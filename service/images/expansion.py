"""What stands for an image in a prompt, and what the encoder gets, by the model's own processor.

Each family of models writes images in its own way: tiles with marks, rows with breaks, … Several
processors of transformers cannot be loaded without libraries for videos, which images do not need.
Of those the image processor alone is used, and what they would write is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, Idefics3Processor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.processing_utils import ProcessorMixin

_TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_NOT_FOR_ENCODERS = frozenset({"rows", "cols", "num_crops", "num_patches"})
_GRID = "image_grid_thw"

Tensors = dict[str, Any]


class Expansion(NamedTuple):
    """An image in a prompt.

    Attributes:
        token_ids: that stand for it.
        tensors: that the encoder takes.
        before: text that stands before these tokens, and is tokenised with the prompt.
        after: likewise, behind them.
    """

    token_ids: list[int]
    tensors: Tensors
    before: str = ""
    after: str = ""


# Makes that of an image, and the number of images in its prompt.
Expand = Callable[[Image.Image, int], Expansion]


class Checkpoint:
    """A model's processor, tokenizer and configuration, as they are needed.

    Args:
        model_id: its directory or name.
        config: of the model.
        common: arguments for whatever is loaded.
    """

    def __init__(self, model_id: str, config: Any, common: dict[str, Any]) -> None:
        self._model_id = model_id
        self._common = common
        self.config = config

    @property
    def placeholder(self) -> int:
        """The token in whose place the encoder's results are put."""
        found = getattr(self.config, "image_token_id", None)
        return int(self.config.image_token_index if found is None else found)

    def tokenizer(self) -> Any:
        """The tokenizer."""
        return AutoTokenizer.from_pretrained(self._model_id, **self._common)

    def images(self) -> Any:
        """The image processor, in its form without torch."""
        load: Any = AutoImageProcessor.from_pretrained
        return load(self._model_id, backend="pil", **self._common)

    def whole(self) -> Any:
        """The processor."""
        load: Any = AutoProcessor.from_pretrained
        return load(self._model_id, **self._common)

    def fields(self) -> dict[str, Any]:
        """What the processor's file says."""
        found, _ = ProcessorMixin.get_processor_dict(self._model_id, **self._common)
        return dict(found)


class Family(NamedTuple):
    """How prompts of a model have images.

    Attributes:
        expand: see `Expand`.
        mark: the token of a prompt that an image's tokens replace.
        shown: the tokens that a template writes for an image, the mark among them.
    """

    expand: Expand
    mark: int
    shown: list[int]


def family_of(checkpoint: Checkpoint) -> Family:
    """How prompts of this model have images."""
    config = checkpoint.config
    kind = config.model_type
    if kind.startswith("qwen"):
        mark = checkpoint.placeholder
        shown = [config.vision_start_token_id, mark, config.vision_end_token_id]
        return Family(_grids(checkpoint), mark, shown)
    if kind == "llava" and config.vision_config.model_type == "pixtral":
        kind = config.vision_config.model_type
    if kind in _MADE_HERE:
        return Family(
            _MADE_HERE[kind](checkpoint), checkpoint.placeholder, [checkpoint.placeholder]
        )
    whole = checkpoint.whole()
    mark = int(whole.tokenizer.convert_tokens_to_ids(whole.image_token))
    expand = _between_marks(whole) if kind == "gemma3" else _by_processor(whole)
    return Family(expand, mark, [mark])


def _grids(checkpoint: Checkpoint) -> Expand:
    """Of the Qwen models: as many placeholders as patches, merged."""
    images, placeholder = checkpoint.images(), checkpoint.placeholder

    def expand(image: Image.Image, _: int) -> Expansion:
        made = dict(images(images=[image], return_tensors="np"))
        num_tokens = int(made[_GRID].prod()) // images.merge_size**2
        return Expansion([placeholder] * num_tokens, made)

    return expand


def _by_processor(whole: Any) -> Expand:
    """What a processor makes of its own mark: that begins and ends with special tokens."""
    mark = whole.image_token

    def expand(image: Image.Image, _: int) -> Expansion:
        made = dict(whole(text=mark, images=[image], add_special_tokens=False, return_tensors="np"))
        token_ids = [int(index) for index in made["input_ids"][0]]
        return Expansion(token_ids, _for_encoder(made))

    return expand


def _between_marks(whole: Any) -> Expand:
    """Of Gemma 3: ends of lines around an image, and a sentence if it comes in crops, are text."""
    begin, end, tokenizer = whole.boi_token, whole.tokenizer.eoi_token, whole.tokenizer

    def expand(image: Image.Image, _: int) -> Expansion:
        made = dict(whole.image_processor(images=[image], return_tensors="np"))
        written = whole.replace_image_token(made, 0)
        first, last = written.index(begin), written.rindex(end) + len(end)
        token_ids = tokenizer(written[first:last], add_special_tokens=False)["input_ids"]
        return Expansion(token_ids, _for_encoder(made), written[:first], written[last:])

    return expand


def _rows(checkpoint: Checkpoint) -> Expand:
    """Of Pixtral: rows of placeholders, with a break behind each and an end behind the last."""
    images, fields, tokenizer = checkpoint.images(), checkpoint.fields(), checkpoint.tokenizer()
    side = fields.get("patch_size", 16) * fields.get("spatial_merge_size", 1)
    names = (
        ("image_token", "[IMG]"),
        ("image_break_token", "[IMG_BREAK]"),
        ("image_end_token", "[IMG_END]"),
    )
    mark, line_end, end = (
        tokenizer.convert_tokens_to_ids(fields.get(name, usual)) for name, usual in names
    )

    def expand(image: Image.Image, _: int) -> Expansion:
        made = dict(images(images=[image], patch_size=side, return_tensors="np"))
        height, width = (int(size) // side for size in made["image_sizes"][0])
        rows = [*[mark] * width, line_end] * height
        return Expansion([*rows[:-1], end], made)

    return expand


def _tiles(checkpoint: Checkpoint) -> Expand:
    """Of SmolVLM, which writes the tiles of an image as Idefics 3 does."""
    images, fields, tokenizer = checkpoint.images(), checkpoint.fields(), checkpoint.tokenizer()
    writer: Any = Idefics3Processor.__new__(Idefics3Processor)
    writer.fake_image_token = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
    writer.image_token = getattr(tokenizer, "image_token", "<image>")
    writer.global_image_tag = getattr(tokenizer, "global_image_token", "<global-img>")
    writer.image_seq_len = fields.get("image_seq_len", 169)

    def expand(image: Image.Image, _: int) -> Expansion:
        made = dict(images(images=[[image]], return_row_col_info=True, return_tensors="np"))
        written = writer.replace_image_token(made, 0)
        token_ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        return Expansion(token_ids, _for_encoder(made))

    return expand


def _patches(checkpoint: Checkpoint) -> Expand:
    """Of InternVL: as many placeholders for each part, between two marks."""
    images, fields, tokenizer = checkpoint.images(), checkpoint.fields(), checkpoint.tokenizer()
    first, last = tokenizer.start_image_token_id, tokenizer.end_image_token_id
    per_part = fields.get("image_seq_length", 256)

    def expand(image: Image.Image, _: int) -> Expansion:
        made = dict(images(images=[image], crop_to_patches=True, return_tensors="np"))
        num_tokens = per_part * int(made["num_patches"][0])
        placeholders = [checkpoint.placeholder] * num_tokens
        return Expansion([first, *placeholders, last], _for_encoder(made))

    return expand


def _any_resolution(checkpoint: Checkpoint) -> Expand:
    """Of LLaVA-OneVision: an image that is alone in its prompt comes in parts, others do not."""
    images, fields, tokenizer = checkpoint.images(), checkpoint.fields(), checkpoint.tokenizer()
    writer: Any = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    writer.image_processor = images
    writer.image_token = getattr(tokenizer, "image_token", fields.get("image_token", "<image>"))
    writer.num_image_tokens = fields["num_image_tokens"]
    writer.vision_feature_select_strategy = fields.get("vision_feature_select_strategy")
    writer.vision_aspect_ratio = fields.get("vision_aspect_ratio", "anyres_max_9")

    def expand(image: Image.Image, num_images: int) -> Expansion:
        made = dict(images(images=[[image] * min(num_images, 2)], return_tensors="np"))
        written = writer.replace_image_token(made, 0)
        token_ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        return Expansion(token_ids, {name: value[:1] for name, value in made.items()})

    return expand


_MADE_HERE: dict[str, Callable[[Checkpoint], Expand]] = {
    "internvl": _patches,
    "llava_onevision": _any_resolution,
    "mistral3": _rows,
    "pixtral": _rows,
    "smolvlm": _tiles,
}


def _for_encoder(made: dict[str, Any]) -> Tensors:
    return {name: made[name] for name in made.keys() - _TEXT_INPUTS - _NOT_FOR_ENCODERS}
