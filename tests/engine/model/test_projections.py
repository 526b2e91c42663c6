"""Query, key and value as one product: logits and tokens stay, and nothing is kept in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.attention.kv_cache import KVCache
from engine.attention.paged import ReferenceAttention
from engine.engine import Engine
from engine.model import passes, quantization
from engine.model.loaded import LoadedModel
from engine.model.model_runner import ModelRunner
from engine.model.projections import MergedProjections, ProjectionPart, merge_projections
from engine.model.quantized_linear import Int8Linear
from engine.model.self_check import attach_paged_attention
from engine.protocol.request import Request
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import (
    ARCHITECTURES,
    CPU,
    NUM_NEW_TOKENS,
    build_model,
    generate,
    make_prompts,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS = 3
WHOLE = ("gpt2", "phi3")  # have one layer for all three already
APART = [name for name in ARCHITECTURES if name not in WHOLE]


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.arange(3, 23).unsqueeze(0), use_cache=False).logits
    return found


def merged_layers(model: nn.Module) -> list[MergedProjections]:
    return [module for module in model.modules() if isinstance(module, MergedProjections)]


@pytest.mark.parametrize("name", APART)
def test_logits_stay_the_same_and_can_be_restored(name: str) -> None:
    model = build_model(ARCHITECTURES[name](), scale=1.0)
    expected = logits(model)
    merging = merge_projections(model)
    assert merging.num_merged == len(merged_layers(model)) == NUM_LAYERS
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    merging.undo()
    assert torch.equal(logits(model), expected)
    assert merged_layers(model) == []


@pytest.mark.parametrize("name", WHOLE)
def test_models_that_have_one_layer_are_not_changed(name: str) -> None:
    assert merge_projections(build_model(ARCHITECTURES[name]())).num_merged == 0


@pytest.mark.parametrize("name", APART)
def test_tokens_are_those_of_transformers(name: str) -> None:
    loaded = attach_paged_attention(build_model(ARCHITECTURES[name]()), CPU, torch.float32)
    passes.merge_projections(loaded)
    assert len(merged_layers(loaded.model)) == NUM_LAYERS
    cache = KVCache(loaded.layers, 40, 16, torch.float32, CPU)
    scheduler = Scheduler(BlockManager(40, 16), max_step_tokens=16, max_num_seqs=40)
    engine = Engine(ModelRunner(loaded, cache, ReferenceAttention()).forward, scheduler, CPU)
    requests = [
        Request(request_id=str(index), prompt_token_ids=prompt, max_new_tokens=NUM_NEW_TOKENS)
        for index, prompt in enumerate(make_prompts())
    ]
    outputs = run(engine, *requests)
    assert [token_ids(outputs[one.request_id]) for one in requests] == generate(name)


def test_a_step_is_one_product_and_leaves_nothing_behind() -> None:
    model = build_model(ARCHITECTURES["llama"]())
    merge_projections(model)
    calls: list[nn.Module] = []
    for merged in merged_layers(model):
        merged.whole.register_forward_hook(lambda layer, *_: calls.append(layer))
    logits(model)
    assert len(calls) == len(set(calls)) == NUM_LAYERS
    assert all(merged._input is None and not merged._parts for merged in merged_layers(model))


def parts() -> list[ProjectionPart]:
    layer = nn.Module()
    for name, width in (("q_proj", 6), ("k_proj", 2), ("v_proj", 4)):
        setattr(layer, name, nn.Linear(5, width))
    assert merge_projections(layer).num_merged == 1
    return [part for part in layer.children() if isinstance(part, ProjectionPart)]


@torch.no_grad()
def test_parts_of_other_inputs_in_any_order_are_right() -> None:
    query, key, value = parts()
    whole = query.merged.whole
    assert [(part.first, part.width) for part in (query, key, value)] == [(0, 6), (6, 2), (8, 4)]
    x, y = torch.randn(2, 3, 5)
    for part, given in [(query, x), (key, y), (key, y), (value, x), (query, x), (query, y)]:
        wanted = whole(given)[:, part.first : part.first + part.width]
        assert torch.equal(part(given), wanted)


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(5, 2, bias=False),  # the others have biases
        nn.Linear(4, 2),
        nn.Linear(5, 2, dtype=torch.bfloat16),
        nn.Identity(),
    ],
    ids=["no bias", "width", "format", "kind"],
)
def test_layers_that_do_not_fit_together_stay_apart(other: nn.Module) -> None:
    layer = nn.Module()
    layer.q_proj, layer.k_proj, layer.v_proj = nn.Linear(5, 6), other, nn.Linear(5, 2)
    assert merge_projections(layer).num_merged == 0


def test_layers_that_share_a_weight_or_have_a_hook_stay_apart() -> None:
    layer = nn.Module()
    layer.q_proj, layer.k_proj, layer.v_proj = nn.Linear(5, 2), nn.Linear(5, 2), nn.Linear(5, 2)
    layer.v_proj.register_forward_hook(lambda *_: None)
    assert merge_projections(layer).num_merged == 0
    layer.v_proj = nn.Linear(5, 2)
    layer.v_proj.weight = layer.k_proj.weight
    assert merge_projections(layer).num_merged == 0


def test_merged_weights_are_quantised_as_one() -> None:
    model = build_model(ARCHITECTURES["qwen2"](), scale=1.0)
    expected = logits(model)
    merge_projections(model)
    scheme = quantization.Scheme("int8", Int8Linear.from_linear, Int8Linear.fits)
    quantization.apply(model, scheme)
    assert all(isinstance(merged.whole, Int8Linear) for merged in merged_layers(model))
    assert float((logits(model) - expected).std() / expected.std()) < 0.1


def test_a_model_that_reads_a_weight_keeps_its_layers(monkeypatch: Any) -> None:
    loaded = attach_paged_attention(build_model(ARCHITECTURES["llama"]()), CPU, torch.float32)
    attention = type(loaded.model.model.layers[0].self_attn)
    forward = attention.forward

    def reads(self: Any, *args: Any, **named: Any) -> Any:
        assert self.q_proj.weight.dtype is torch.float32
        return forward(self, *args, **named)

    monkeypatch.setattr(attention, "forward", reads)
    passes.merge_projections(loaded)
    assert isinstance(loaded, LoadedModel)
    assert merged_layers(loaded.model) == []
