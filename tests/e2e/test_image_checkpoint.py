"""A checkpoint that exists only with an image part answers texts, and refuses images by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.architectures import ARCHITECTURES
from benchmarks.models import continued
from tests.e2e.stack import Stack
from tests.paths import DEMO_MODEL

(QWEN_VL,) = (one for one in ARCHITECTURES if one.name == "Qwen 2.5 VL")
MODEL = replace(QWEN_VL, options={**QWEN_VL.options, "vocab_size": 5000})
PROMPT = "What is Deep Learning?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    MODEL.build().save_pretrained(folder)
    for path in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_a_text_is_answered_as_by_transformers(served: Stack) -> None:
    parameters = {"max_new_tokens": 24, "details": True, "decoder_input_details": True}
    body = {"inputs": PROMPT, "parameters": parameters | {"ignore_eos": True}}
    details = served.http.post("/generate", json=body).json()["details"]
    prompt = [token["id"] for token in details["prefill"]]
    with torch.inference_mode():
        expected = continued(MODEL.build(), prompt)
    assert [token["id"] for token in details["tokens"]] == expected


def test_an_image_is_refused(served: Stack) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/image.png"}}
    message = {"role": "user", "content": [{"type": "text", "text": PROMPT}, image]}
    answer = served.http.post("/v1/chat/completions", json={"messages": [message]})
    assert answer.status_code == 422
    assert "`image_url` is not supported" in answer.json()["error"]
