"""Experts of mixtures, packed: the same products, whichever other rows are in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen3MoeConfig,
)

from engine.build import build_engine
from engine.kernels.grouped_int8 import GroupedInt8Linear
from engine.kernels.int4 import PackedInt4Linear
from engine.kernels.int8 import PackedInt8Linear
from engine.kernels.packed_linear import PackedLinear
from engine.model import quantization
from engine.model.experts import PackedExperts, matrices_of, pack_experts, pack_mixtures
from engine.model.input_weights import use_interface
from engine.model.passes import pack_layers, quantize_model
from engine.model.quantization import Scheme
from engine.model.self_check import attach_paged_attention
from engine.protocol.request import Request
from tests.engine.fakes import run, token_ids
from tests.engine.kernels.test_grouped_int8 import stored
from tests.engine.model.architectures import SMALL, build_model
from tests.engine.model.quantized import config, relative_error
from tests.engine.native import TARGETS, kernels_for

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Gated; gated with interleaved halves, biases and transposed matrices; not gated.
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(
        **{**SMALL, "intermediate_size": 128}, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, **_EXPERTS, num_experts=8, head_dim=16),
    "gpt_oss": lambda: GptOssConfig(
        **{**SMALL, "intermediate_size": 128},
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **SMALL, **_EXPERTS, n_routed_experts=4, layers_block_type=["attention", "moe", "attention"]
    ),
}


def experts_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if matrices_of(module))


def scheme(name: str) -> Scheme:
    kernels_for("whole")
    found = quantization.choose(config(Path(), name), object(), CPU, torch.float32)
    assert found is not None
    return found


def packed(stock: nn.Module, quantize: str | None) -> Any:
    """Experts for the kernels, whose weights are quantised if there is a name."""
    holder = nn.Sequential(stock)
    if quantize is None:
        assert pack_mixtures(holder, kernels_for("whole")) == 1
        return holder[0]
    found = scheme(quantize)
    assert found.kernels is not None
    return pack_experts(stock, found.make, found.kernels)


def routed(num_tokens: int, experts: Any, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and weights of tokens."""
    width = 64
    chosen = torch.rand(num_tokens, experts.num_experts).topk(top_k).indices
    return torch.randn(num_tokens, width), chosen, torch.rand(num_tokens, top_k)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("quantize", "error"), [(None, 1e-6), ("int8", 0.03), ("int4", 0.25)])
def test_results_are_near_those_of_transformers(
    name: str, quantize: str | None, error: float
) -> None:
    stock: Any = experts_of(build_model(CONFIGS[name](), scale=1.0))
    x, chosen, weights = routed(50, stock)
    with torch.inference_mode():
        expected = stock(x, chosen, weights)
        found = packed(stock, quantize)(x, chosen, weights)
    assert relative_error(found, expected) < error
    assert not list(stock.parameters())  # the weights are freed


def test_experts_that_have_8_bits_keep_them() -> None:
    stock: Any = experts_of(build_model(CONFIGS["mixtral"]()))
    for matrices in matrices_of(stock).values():
        layer = nn.Linear(matrices.shape[2], matrices.shape[0] * matrices.shape[1])
        layer.weight.data = matrices.flatten(0, 1)
        matrices.copy_(stored(layer).weight.data.view_as(matrices))
    experts = packed(stock, "int8")
    assert isinstance(experts.up, GroupedInt8Linear)
    assert isinstance(experts.down, GroupedInt8Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_that_have_16_bits_keep_them(dtype: torch.dtype) -> None:
    stock: Any = experts_of(build_model(CONFIGS["gpt_oss"]()).to(dtype).float())
    x, chosen, weights = routed(9, stock)
    with torch.inference_mode():
        expected = stock(x, chosen, weights)
        experts = packed(stock, None)
        assert relative_error(experts(x, chosen, weights), expected) < 1e-6
    if dtype is torch.bfloat16 or kernels_for("whole").has_float16:
        assert {experts.up.packed.dtype, experts.down.packed.dtype} == {dtype}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "kind", [PackedLinear, PackedInt8Linear, PackedInt4Linear, GroupedInt8Linear]
)
def test_rows_of_an_expert_are_multiplied_as_by_its_own_layer(kind: Any, target: str) -> None:
    kernels = kernels_for(target)
    width = 2 * kernels.panel_width
    whole = nn.Linear(128, 5 * width)
    if kind is GroupedInt8Linear:
        stored(whole)
    layer = kind.from_linear(whole, kernels)
    layer.out_features = width - 3
    ends = torch.tensor([3, 3, 230, 231, 400])  # one expert has no row, one more than a chunk
    x = torch.randn(400, 128)
    y = layer(x, ends)
    for expert, (start, end) in enumerate(
        zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
    ):
        one = nn.Linear(128, width)
        one.weight.data = whole.weight.data[expert * width : (expert + 1) * width]
        one.bias.data = whole.bias.data[expert * width : (expert + 1) * width]
        expected = kind.from_linear(one, kernels)(x[start:end])[:, : width - 3]
        assert torch.equal(y[start:end], expected)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_token_ignores_the_others_of_its_step(quantize: str | None) -> None:
    stock: Any = experts_of(build_model(CONFIGS["qwen3_moe"](), scale=1.0))
    experts = packed(stock, quantize)
    x, chosen, weights = routed(301, stock)
    with torch.inference_mode():
        whole = experts(x, chosen, weights)
        for rows in (slice(7, 8), slice(3, 12), slice(100, 232)):
            assert torch.equal(experts(x[rows], chosen[rows], weights[rows]), whole[rows])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_nothing_of_the_experts_is_left(name: str) -> None:
    loaded = attach_paged_attention(build_model(CONFIGS[name](), scale=1.0), CPU, torch.float32)
    note = quantize_model(replace(loaded, scheme=scheme("int4")))
    assert note is not None
    assert "experts" not in note
    assert sum(isinstance(module, PackedExperts) for module in loaded.model.modules()) == 3


def test_matrices_without_whole_groups_have_8_bits() -> None:
    model = build_model(
        MixtralConfig(**{**SMALL, "intermediate_size": 72}, num_local_experts=4), scale=1.0
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    in_8_bits = 128 * 64 + 3 * 4 * 64 * 72  # the output layer, and down_proj of all experts
    loaded = attach_paged_attention(model, CPU, torch.float32)
    note = quantize_model(replace(loaded, scheme=scheme("int4")))
    assert note is not None
    assert f", {in_8_bits / total:.0%} to int8," in note
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    assert isinstance(experts.up, PackedInt4Linear)
    assert isinstance(experts.down, PackedInt8Linear)


def test_matrices_that_do_not_fit_are_packed_as_they_are() -> None:
    model = build_model(CONFIGS["mixtral"](), scale=1.0)
    loaded = attach_paged_attention(model, CPU, torch.float32)
    no_experts = replace(scheme("int8"), kernels=None)
    note = quantize_model(replace(loaded, scheme=no_experts))
    assert note is not None
    assert "million of them in experts of mixtures" in note
    pack_layers(loaded, kernels_for("whole"))
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    assert isinstance(experts.up, PackedLinear)


def test_experts_of_another_make_are_left() -> None:
    stock: Any = experts_of(build_model(CONFIGS["mixtral"]()))
    stock.extra = nn.Parameter(torch.zeros(3))
    assert not matrices_of(stock)
    assert not matrices_of(nn.Linear(3, 3))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_engines_record_steps_with_experts_and_answer_alone_as_among_others(
    tmp_path: Path, quantize: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    kernels_for("whole")
    build_model(CONFIGS["qwen3_moe"](), scale=1.0).save_pretrained(tmp_path)
    engine, _ = build_engine(config(tmp_path, quantize, max_batch_total_tokens=2048))
    assert "not recorded" not in caplog.text
    requests = [
        Request(request_id=str(i), prompt_token_ids=(3 + i, 9, 4 + 2 * i), max_new_tokens=12)
        for i in range(5)
    ]
    together = run(engine, *requests)
    for request in requests[:2]:
        alone = run(engine, request)[request.request_id]
        assert token_ids(alone) == token_ids(together[request.request_id])


def mixture_of_weighed_inputs(top_k: int) -> Any:
    """A mixture of Llama 4, whose experts get tokens times their weights."""
    options = {"num_local_experts": 4, "num_experts_per_tok": top_k, "intermediate_size_mlp": 96}
    model = build_model(Llama4TextConfig(**{**SMALL, "head_dim": 16}, **options), scale=1.5)
    return next(module for module in model.modules() if type(module).__name__ == "Llama4TextMoe")


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("quantize", "error"), [(None, 1e-6), ("int8", 0.03)])
def test_experts_whose_input_is_weighed_get_the_tokens_that_chose_them(
    top_k: int, quantize: str | None, error: float
) -> None:
    block = mixture_of_weighed_inputs(top_k)
    x = torch.randn(1, 61, 64)
    with torch.inference_mode():
        expected, logits = block(x)
        use_interface(block)
        use_interface(block)
        assert torch.equal(block(x)[0], expected)  # of experts that are not packed
        block.experts = packed(block.experts, quantize)
        num_rows: list[int] = []
        block.experts.up.register_forward_pre_hook(lambda _, given: num_rows.append(len(given[0])))
        found, same_logits = block(x)
        assert relative_error(found, expected) < error
        assert torch.equal(same_logits, logits)
    assert num_rows == [61 * top_k]


def test_other_mixtures_keep_their_code() -> None:
    for name in ("mixtral", "gpt_oss"):
        model = build_model(CONFIGS[name]())
        use_interface(model)
        assert not any("forward" in vars(module) for module in model.modules())
