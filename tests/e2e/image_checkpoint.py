"""A tiny random LLaVA with tokenizer, processor and chat template, made by code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE = 28  # pixels of what the encoder sees
_PATCH = 14
_SPECIAL = ("<s>", "</s>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make(folder: Path) -> None:
    """Writes a checkpoint."""
    processor = _processor()
    processor.save_pretrained(folder)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=_PATCH,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    silence(model, processor.tokenizer, _SPECIAL)
    model.save_pretrained(folder)


def silence(model: Any, words: PreTrainedTokenizerFast, special: Sequence[str]) -> None:
    """Makes random weights larger, and leaves out tokens that are no letter of their own.

    An answer without them has a character for each token.
    """
    for parameter in model.parameters():
        parameter.data.mul_(4)
    texts = ((index, words.decode([index])) for index in range(len(words)))
    model.lm_head.weight.data[
        [
            index
            for index, text in texts
            if not (text.isascii() and text.isprintable()) or text in special
        ]
    ] = 0
    model.generation_config.eos_token_id = None


def tokenizer(
    special: Sequence[str], named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """One whose tokens are bytes, and these; they begin with those for begin and end.

    `named` are some of them that it has under a name, too.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=dict(named or {}),
    )


def _processor() -> LlavaProcessor:
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer(_SPECIAL),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    """A picture's file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@torch.inference_mode()
def generated(
    folder: Path, messages: list[dict[str, Any]], images: list[Image.Image], num_tokens: int
) -> tuple[str, int]:
    """What transformers' generate answers, and the number of the prompt's tokens."""
    processor = LlavaProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=images or None, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(answer, skip_special_tokens=True)
    return text, inputs["input_ids"].shape[1]
