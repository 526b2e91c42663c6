"""A tiny random Qwen 2.5 VL with tokenizer, image processor and chat template, made by code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import (
    AutoImageProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from tests.e2e.image_checkpoint import silence, tokenizer
from tests.engine.images.models import FAMILIES

_START, _PAD, _END, _VIDEO = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"
_SPECIAL = ("<s>", "</s>", _START, _PAD, _END, _VIDEO)
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{_START}{_PAD}{_END}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make(folder: Path) -> None:
    """Writes a checkpoint."""
    words = tokenizer(_SPECIAL)
    words.chat_template = _TEMPLATE
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    ).save_pretrained(folder)
    config = FAMILIES["qwen2_5_vl"].config()
    config.text_config.vocab_size = len(words)
    for name, mark in (
        ("image_token_id", _PAD),
        ("video_token_id", _VIDEO),
        ("vision_start_token_id", _START),
        ("vision_end_token_id", _END),
    ):
        setattr(config, name, words.convert_tokens_to_ids(mark))
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    silence(model, words, _SPECIAL)
    model.save_pretrained(folder)


@torch.inference_mode()
def generated(
    folder: Path, messages: list[dict[str, Any]], images: list[Image], num_tokens: int
) -> tuple[str, int]:
    """What transformers' generate answers, and the number of the prompt's tokens."""
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    made = processor(images=images, return_tensors="pt")
    counts = (made["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist()
    first, *rest = words.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    ).split(_PAD)
    text = first + "".join(_PAD * count + part for count, part in zip(counts, rest, strict=True))
    ids = torch.tensor([words(text, add_special_tokens=False)["input_ids"]])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == words.convert_tokens_to_ids(_PAD)).int(),
        max_new_tokens=num_tokens,
        do_sample=False,
        **made,
    )
    answer = words.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer, ids.shape[1]
