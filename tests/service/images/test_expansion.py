"""Prompts with images are to the model what its processor of transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

pytest.importorskip("PIL")

from engine.images.encoder import ImageEncoder
from engine.protocol.images import Image
from service.images import worker
from service.images.pictured import Picture, PicturedText, Pictures
from tests.e2e.family_checkpoints import RECIPES, make, prepared
from tests.e2e.image_checkpoint import picture, png
from tests.engine.images.models import together
from tests.on_demand import ALL_MODELS

SAMPLE = ("gemma3", "mistral3", "smolvlm")
TRIED = RECIPES if ALL_MODELS else SAMPLE
PICTURES = [picture(1, 60, 90), picture(2, 150, 64)]


@pytest.fixture(scope="module", params=TRIED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(name)
    make(made, name)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder, config=config)


def pictures(folder: Path, count: int) -> Pictures:
    """The first images, as the worker makes them ready."""
    answer = worker.start([str(folder), None, False])
    found = []
    for one in PICTURES[:count]:
        made = answer({"data": png(one), "max_pixels": 10**6, "num_images": count})
        assert "error" not in made, made
        image = Image.unpacked([*made["image"][:2], made["image"][2]])
        found.append(Picture(tuple(made["ids"]), image, *made["around"]))
    return Pictures(tuple(found), made["mark"], tuple(made["shown"]), made["mark_text"])


def tensors(image: Image) -> dict[str, torch.Tensor]:
    return {
        part.name: torch.from_numpy(np.frombuffer(part.data, part.dtype).reshape(part.shape).copy())
        for part in image.tensors
    }


@pytest.mark.parametrize("count", [1, 2])
def test_a_prompt_is_what_the_processor_makes_of_it(
    name: str, folder: Path, model: Any, count: int
) -> None:
    mark = RECIPES[name].mark or RECIPES[name].placeholder
    prompt = f"user:\n{mark}" + f"and\n{mark}" * (count - 1) + "\nWhat?\n"
    made = pictures(folder, count)
    expected = prepared(folder, name, prompt, PICTURES[:count], model)
    text = PicturedText(prompt, made)
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    token_ids, images = text.expanded(tuple(words(text.text)["input_ids"]))
    assert [*token_ids] == expected.pop("input_ids")[0].tolist()
    del expected["attention_mask"]
    actual = together([tensors(image) for image in images])
    assert actual.keys() == expected.keys()
    if name == "llava_onevision":  # which says how many there are once, and not of each
        assert set(actual.pop("batch_num_images").tolist()) == {count}
        del expected["batch_num_images"]
    torch.testing.assert_close(actual, {key: expected[key] for key in actual}, check_dtype=False)
    encoder = ImageEncoder(model, 1)
    for image in images:
        encoder.encode(image)  # which raises where placeholders are more or fewer than embeddings
