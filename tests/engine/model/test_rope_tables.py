"""Tables of the rotary embedding: which layers they replace, and that they equal the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Phi3Config

from engine.attention.paged import ReferenceAttention
from engine.build import build_engine
from engine.model import prepare
from engine.model.image_part import set_aside
from engine.model.loaded import LoadedModel
from engine.model.passes import use_rotary_tables
from engine.model.rope_tables import RotaryTable, restore_rotary, tabulate_rotary
from engine.model.self_check import attach_paged_attention, paged_logits
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request
from tests.engine.fakes import run
from tests.engine.images.models import FAMILIES
from tests.engine.model.architectures import ARCHITECTURES, CPU, SMALL, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_POSITIONS = 64
LIKE = torch.empty(0)
WITH_ROTARY = sorted(ARCHITECTURES.keys() - {"gpt2"})


def load(name: str) -> LoadedModel:
    return attach_paged_attention(build_model(ARCHITECTURES[name]()), CPU, torch.float32)


def longrope() -> LoadedModel:
    """A model whose rotary embedding changes in texts of more than 32 tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(
        **{**SMALL, "original_max_position_embeddings": 32},
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
            **factors,
        },
    )
    return attach_paged_attention(build_model(config), CPU, torch.float32)


def logits(loaded: LoadedModel) -> Tensor:
    return paged_logits(loaded, ReferenceAttention())


def tables_of(model: nn.Module) -> list[RotaryTable]:
    return [layer for layer in model.modules() if isinstance(layer, RotaryTable)]


@pytest.mark.parametrize("name", WITH_ROTARY)
def test_tables_do_not_change_the_logits(name: str) -> None:
    loaded = load(name)
    expected = logits(loaded)
    use_rotary_tables(loaded, NUM_POSITIONS)
    assert len(tables_of(loaded.model)) == 1
    assert torch.equal(logits(loaded), expected)


def test_a_model_without_rotary_embedding_is_not_changed() -> None:
    loaded = load("gpt2")
    use_rotary_tables(loaded, NUM_POSITIONS)
    assert not tables_of(loaded.model)


@given(
    positions=st.lists(st.integers(0, NUM_POSITIONS - 1), min_size=1, max_size=9),
    name=st.sampled_from(["llama", "gemma3"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_tables_hold_the_cosines_and_sines_of_the_model(
    positions: list[int], name: str, dtype: torch.dtype
) -> None:
    model = build_model(ARCHITECTURES[name]())
    stock = model.model.rotary_emb
    (table,) = tabulate_rotary(model, LIKE.to(dtype), NUM_POSITIONS)
    ids = torch.tensor([positions])
    for kind in [["sliding_attention"], ["full_attention"]] if name == "gemma3" else [[]]:
        actual, expected = table(LIKE, ids, *kind), stock(LIKE.to(dtype), ids, *kind)
        assert {part.dtype for part in actual} == {dtype}
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_tables_are_for_texts_where_tokens_have_three_positions(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = attach_paged_attention(FAMILIES[name].build(), CPU, torch.float32)
    with set_aside(loaded.model, loaded.stock_attention):
        use_rotary_tables(loaded, NUM_POSITIONS)
    assert "in every step" not in caplog.text
    (table,) = tables_of(loaded.model)
    text = torch.tensor([[3, 9, 41]]).expand(3, 1, 3)
    within_image = torch.tensor([[[3, 3, 3]], [[3, 3, 4]], [[3, 4, 3]]])
    for positions in (text, within_image):
        torch.testing.assert_close(table(LIKE, positions), table.stock(LIKE, positions))


class TestEmbeddingsThatDependOnTheLongestPosition:
    def test_are_those_of_a_text_of_the_largest_length(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        loaded = longrope()
        stock = loaded.model.model.rotary_emb
        note = use_rotary_tables(loaded, 48)
        assert note is not None
        assert "depends on a text's length: every text has that of 48 tokens" in note
        assert note in caplog.text
        (table,) = tables_of(loaded.model)
        alone, in_batch = torch.tensor([[3]]), torch.tensor([[3, 47]])
        cos, _ = table(LIKE, alone)
        assert torch.equal(cos, table(LIKE, in_batch)[0][:, :1])
        assert torch.equal(cos, stock(LIKE, in_batch)[0][:, :1])
        assert not torch.allclose(cos, stock(LIKE, alone)[0])

    def test_are_the_usual_ones_if_no_text_can_be_long(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        loaded = longrope()
        expected = logits(loaded)
        assert use_rotary_tables(loaded, 32) is None
        assert len(tables_of(loaded.model)) == 1
        assert "depend" not in caplog.text
        assert torch.equal(logits(loaded), expected)


class _Other(nn.Module):
    """Has the interface of a rotary embedding layer."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.embedding(position_ids[..., None].float())


class FlatRotaryEmbedding(_Other):
    def embedding(self, positions: Tensor) -> Any:
        return positions.flatten(), positions.flatten()


class SingleRotaryEmbedding(_Other):
    def embedding(self, positions: Tensor) -> Any:
        return positions.cos()


class CountingRotaryEmbedding(_Other):
    """Gives every call different cosines and sines."""

    calls = 0

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        self.calls += 1
        cos, sin = self.stock(x, position_ids)
        return cos * self.calls, sin * self.calls


class OtherEmbedding(nn.Module):
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        pytest.fail("it was tried")


@pytest.mark.parametrize("kind", [FlatRotaryEmbedding, SingleRotaryEmbedding, OtherEmbedding])
def test_layers_that_compute_something_else_are_not_replaced(kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"layer": kind()})
    assert tabulate_rotary(model, LIKE, NUM_POSITIONS) == []
    assert type(model["layer"]) is kind


def test_a_model_whose_logits_would_change_gets_its_layers_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = load("llama")
    inner = loaded.model.model
    counting = inner.rotary_emb = CountingRotaryEmbedding(inner.rotary_emb)
    loaded.known.forget()  # logits of the model as it was
    use_rotary_tables(loaded, NUM_POSITIONS)
    assert "the rotary embedding is computed in every step" in caplog.text
    assert inner.rotary_emb is counting


def test_restoring_puts_the_layers_back() -> None:
    model = build_model(ARCHITECTURES["llama"]())
    stock = model.model.rotary_emb
    assert tabulate_rotary(model, LIKE, NUM_POSITIONS) == [model.model.rotary_emb]
    restore_rotary(model)
    assert model.model.rotary_emb is stock


def config(folder: Path, **options: Any) -> EngineConfig:
    build_model(ARCHITECTURES["llama"]()).save_pretrained(folder)
    return EngineConfig(
        model_id=str(folder),
        socket_path=folder / "unused.sock",
        device="cpu",
        dtype="float32",
        max_batch_total_tokens=512,
        **options,
    )


def test_a_built_engine_has_tables_for_all_its_positions(tmp_path: Path) -> None:
    """Also if it has fewer positions than the self-check's texts."""
    engine, _ = build_engine(config(tmp_path, max_total_tokens=8))
    longest = Request(request_id="r", prompt_token_ids=(3,) * 5, max_new_tokens=3)
    assert len(run(engine, longest)["r"]) == 3
    refused = engine.add(Request(request_id="s", prompt_token_ids=(3,) * 5, max_new_tokens=4))
    assert refused is not None
    assert refused.error == "9 tokens are more than max_total_tokens, which is 8"


def test_a_built_engine_has_no_tables_if_fusion_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "use_rotary_tables", lambda *_: pytest.fail("tabulated"))
    build_engine(config(tmp_path, enable_fusion=False))
