"""Tiny random models of the families that take images, with tokenizer, processor and template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL.Image import Image
from tokenizers import AddedToken
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerFast

from engine.model.outline import auto_class
from tests.e2e.image_checkpoint import tokenizer
from tests.engine.images.models import FAMILIES

_TEMPLATE = (
    "{{% for message in messages %}}{{{{ message['role'] + ':\n' }}}}"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{mark}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}assistant: {{% endif %}}"
)
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
_AROUND = "<fake_token_around_image>"
_PINPOINTS: dict[str, Any] = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
}
_TILED: dict[str, Any] = {
    "size": {"longest_edge": 168},
    "max_image_size": {"longest_edge": 56},
    "do_image_splitting": True,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a checkpoint is made of.

    Attributes:
        images: the class of its image processor, without the end of its name.
        options: of that.
        placeholder: the token in whose place the encoder's results are put.
        special: other special tokens.
        mark: what a template writes for an image, if that is another token.
        fields: of the processor.
        named: special tokens that the tokenizer has under a name.
        written: what a processor writes for the image with an index, of what the image processor
            made of all; None where transformers' processor can do it here.
    """

    images: str
    options: Mapping[str, Any]
    placeholder: str = "<image>"
    special: tuple[str, ...] = ()
    mark: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    written: Callable[[Recipe, dict[str, Any], int], str] | None = None


def _rows(recipe: Recipe, made: dict[str, Any], index: int) -> str:
    height, width = (size // 28 for size in made["image_sizes"][index].tolist())
    rows = ["[IMG]" * width] * height
    return "[IMG_BREAK]".join(rows) + "[IMG_END]"


def _tiles(recipe: Recipe, made: dict[str, Any], index: int) -> str:
    rows, columns = made["rows"][0][index], made["cols"][0][index]
    lines = [
        "".join(
            f"{_AROUND}<row_{row}_col_{column}>{'<image>' * 4}" for column in range(1, columns + 1)
        )
        for row in range(1, rows + 1)
    ]
    before = "".join(line + "\n" for line in lines) + ("\n" if lines else "")
    return f"{before}{_AROUND}<global-img>{'<image>' * 4}{_AROUND}"


def _patches(recipe: Recipe, made: dict[str, Any], index: int) -> str:
    return f"<img>{'<IMG_CONTEXT>' * (4 * int(made['num_patches'][index]))}</img>"


RECIPES = {
    "gemma3": Recipe(
        "Gemma3",
        {"size": {"height": 56, "width": 56}},
        placeholder="<image_soft_token>",
        special=("<start_of_image>", "<end_of_image>"),
        mark="<start_of_image>",
        fields={"image_seq_length": 16},
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
    "mistral3": Recipe(
        "Pixtral",
        {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}},
        placeholder="[IMG]",
        special=("[IMG_BREAK]", "[IMG_END]"),
        fields={"patch_size": 14, "spatial_merge_size": 2},
        written=_rows,
    ),
    "idefics3": Recipe(
        "Idefics3",
        _TILED,
        special=(_AROUND, "<global-img>", "<end_of_utterance>", *_TILES),
        fields={"image_seq_len": 4},
    ),
    "smolvlm": Recipe(
        "SmolVLM",
        _TILED,
        special=(_AROUND, "<global-img>", *_TILES),
        fields={"image_seq_len": 4},
        written=_tiles,
    ),
    "llava_next": Recipe(
        "LlavaNext",
        _PINPOINTS,
        fields={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_onevision": Recipe(
        "LlavaOnevision",
        {**_PINPOINTS, "size": {"height": 28, "width": 28}},
        special=("<video>",),
        fields={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        written=lambda recipe, made, index: "<image>" * made["num_tokens"][index],
    ),
    "internvl": Recipe(
        "GotOcr2",
        {"size": {"height": 56, "width": 56}, "min_patches": 1, "max_patches": 4},
        placeholder="<IMG_CONTEXT>",
        special=("<img>", "</img>", "<video>"),
        fields={"image_seq_length": 4},
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        written=_patches,
    ),
}
_NOT_FOR_ENCODERS = ("rows", "cols", "num_patches", "num_tokens")
_PROCESSORS = {"mistral3": "Pixtral", "internvl": "InternVL"}


def make(folder: Path, name: str) -> None:
    """Writes a checkpoint."""
    recipe = RECIPES[name]
    words = _tokenizer(recipe)
    words.save_pretrained(folder)
    kind: Any = getattr(transformers, f"{recipe.images}ImageProcessorPil")
    kind(**recipe.options).save_pretrained(folder)
    processor = f"{_PROCESSORS.get(name, recipe.images)}Processor"
    fields = {"processor_class": processor, **recipe.fields}
    (folder / "processor_config.json").write_text(json.dumps(fields))
    family = FAMILIES[name]
    config = family.config()
    config.text_config.vocab_size = len(words)
    placeholder = words.convert_tokens_to_ids(recipe.placeholder)
    config.image_token_id = config.image_token_index = placeholder
    model: Any = family.build(config)
    texts = [words.decode([index]) for index in range(len(words))]
    silent = [index for index, text in enumerate(texts) if not (len(text) == 1 and text.isascii())]
    model.get_output_embeddings().weight.data[silent] = 0
    model.save_pretrained(folder)


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """One whose tokens are bytes, special ones, and ends of lines, of which several are a token."""
    special = ("<s>", "</s>", recipe.placeholder, *recipe.special)
    words = tokenizer(special, recipe.named)
    words.add_tokens([AddedToken("\n" * count, normalized=False) for count in (3, 2)])
    words.chat_template = _TEMPLATE.format(mark=recipe.mark or recipe.placeholder)
    return words


@torch.inference_mode()
def generated(
    folder: Path,
    name: str,
    messages: list[dict[str, Any]],
    images: Sequence[Image],
    num_tokens: int,
) -> tuple[str, int]:
    """What transformers' generate answers, and the number of the prompt's tokens."""
    recipe = RECIPES[name]
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    model: Any = auto_class(transformers.AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float32
    )
    prompt = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = prepared(folder, name, prompt, images, model)
    types = FAMILIES[name].types
    if types is not None:
        placeholder = words.convert_tokens_to_ids(recipe.placeholder)
        inputs[types] = (inputs["input_ids"] == placeholder).int()
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return words.decode(output[0, length:], skip_special_tokens=True), length


def prepared(
    folder: Path, name: str, prompt: str, images: Sequence[Image], model: Any = None
) -> dict[str, Any]:
    """What the model gets of a prompt and its images, as its processor makes it."""
    recipe = RECIPES[name]
    if recipe.written is None:
        processor: Any = AutoProcessor.from_pretrained(folder)
        made = processor(
            text=prompt, images=[[*images]], add_special_tokens=False, return_tensors="pt"
        )
        return {
            key: made[key] for key in made if key not in ("mm_token_type_ids", "token_type_ids")
        }
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    made = _images(folder, name, images, model)
    first, *rest = prompt.split(recipe.mark or recipe.placeholder)
    text = first + "".join(recipe.written(recipe, made, i) + part for i, part in enumerate(rest))
    ids = torch.tensor([words(text, add_special_tokens=False)["input_ids"]])
    encoder = {key: value for key, value in made.items() if key not in _NOT_FOR_ENCODERS}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **encoder}


def _images(folder: Path, name: str, images: Sequence[Image], model: Any) -> dict[str, Any]:
    """What the image processor makes of all images of a prompt."""
    load: Any = AutoImageProcessor.from_pretrained
    process = load(folder, backend="pil")
    if name in ("smolvlm", "llava_onevision"):  # those of a prompt are in a list of their own
        options = {"return_row_col_info": True} if name == "smolvlm" else {}
        made = dict(process(images=[[*images]], return_tensors="pt", **options))
    else:
        options = {"patch_size": 28} if name == "mistral3" else {"crop_to_patches": True}
        made = dict(process(images=[*images], return_tensors="pt", **options))
    if name == "llava_onevision":
        features = model.get_image_features(**made, return_dict=True).pooler_output
        made["num_tokens"] = [len(part) for part in features]
    return made
