"""Models in bfloat16 on a CPU that multiplies it: only their linear layers are rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.attention.paged import ReferenceAttention
from engine.build import build_engine
from engine.kernels.bfloat16 import PackedBfloat16Linear
from engine.model import quantization
from engine.model.loaded import LoadedModel
from engine.model.loading import load_model
from engine.model.passes import quantize_model
from engine.model.self_check import paged_logits
from engine.protocol.request import Request
from tests.engine.fakes import run, token_ids
from tests.engine.model.quantized import config, relative_error
from tests.engine.native import kernels_for
from tests.paths import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def multiplies_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every processor computes such layers, though not all of them faster."""
    kernels = kernels_for("whole")
    monkeypatch.setattr(kernels, "multiplies_pairs", True)
    monkeypatch.setattr(quantization.cpu_kernels, "load", lambda: kernels)


def load(dtype: str, **options: Any) -> LoadedModel:
    return load_model(config(DEMO_MODEL, None, dtype=dtype, **options))


def logits(loaded: LoadedModel) -> torch.Tensor:
    return paged_logits(loaded, ReferenceAttention())


def test_logits_are_nearer_to_those_of_float32_than_where_all_layers_are_rounded() -> None:
    exact, everywhere = load("float32"), load("bfloat16", enable_native_kernels=False)
    loaded = load("bfloat16")
    assert loaded.dtype is torch.float32
    quantize_model(loaded)
    model: Any = loaded.model
    assert isinstance(model.lm_head, PackedBfloat16Linear)
    expected = logits(exact)
    ours, theirs = (relative_error(logits(found), expected) for found in (loaded, everywhere))
    assert 0 < ours < theirs


def test_a_text_is_the_same_beside_others_and_the_format_is_told() -> None:
    engine, info = build_engine(
        config(DEMO_MODEL, None, dtype="bfloat16", max_batch_total_tokens=2048)
    )
    assert info.dtype == "torch.bfloat16"
    prompt = (5, 77, 1234, 4000, 9)
    engine.add(Request(request_id="alone", prompt_token_ids=prompt, max_new_tokens=20))
    alone = token_ids(run(engine)["alone"])
    for index, name in enumerate(("a", "b", "c")):
        ids = (*prompt[:index], *prompt)
        engine.add(Request(request_id=name, prompt_token_ids=ids, max_new_tokens=20))
    assert token_ids(run(engine)["a"]) == alone
