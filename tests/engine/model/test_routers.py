"""Routers choose the same experts for a token, with the same weights, in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, Glm4MoeConfig, PhimoeConfig

from engine.model.activations import activate_by_kernel
from engine.model.routers import multiply_by_kernel
from tests.engine.model.architectures import ARCHITECTURES, SMALL, build_model
from tests.engine.model.test_experts import CONFIGS
from tests.engine.native import kernels_for

pytestmark = pytest.mark.usefixtures("one_thread")

_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
# A product; one with a bias; two of numbers that are asked for in float32; one of a linear layer.
ROUTERS = {
    "mixtral": CONFIGS["mixtral"],
    "gpt_oss": CONFIGS["gpt_oss"],
    "glm4_moe": lambda: Glm4MoeConfig(
        **SMALL, **_ROUTED, head_dim=16, moe_intermediate_size=32, first_k_dense_replace=1
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SMALL, **_ROUTED, "n_routed_experts": 8, "n_group": 2},
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "phimoe": lambda: PhimoeConfig(**SMALL, num_local_experts=4),
}


def router_of(name: str) -> Any:
    model = build_model(ROUTERS[name](), scale=1.0)
    return next(module for module in model.modules() if "Router" in type(module).__name__)


def results(router: nn.Module, x: Tensor) -> list[Tensor]:
    found = router(x)
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_token_is_routed_alone_as_among_others(name: str) -> None:
    router, x = router_of(name), torch.randn(301, 64)
    with torch.inference_mode():
        expected = results(router, x)
        assert multiply_by_kernel(router, kernels_for("whole")) == 1
        activate_by_kernel(router, kernels_for("whole"), lambda: router(x))
        whole = results(router, x)
        for actual, wanted in zip(whole, expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        for rows in (slice(7, 8), slice(3, 12), slice(100, 232)):
            for part, found in zip(results(router, x[rows]), whole, strict=True):
                assert torch.equal(part, found[rows])


def test_other_products_are_left_to_torch() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))
            self.other = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            doubles = nn.functional.linear(x.double(), self.weight.double())
            return self.other(x), doubles, x @ self.weight.t()

    odd, x = Odd(), torch.randn(4, 5)
    expected = odd(x)
    assert multiply_by_kernel(odd, kernels_for("whole")) == 1
    for actual, wanted in zip(odd(x), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_linear_layers_that_are_not_packed_are_multiplied_as_routers_are() -> None:
    layers, x = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 2)), torch.randn(300, 64)
    assert multiply_by_kernel(layers, kernels_for("whole"), left=[layers[0]]) == 1
    with torch.inference_mode():
        whole = layers[0](x)
        for rows in (slice(7, 8), slice(3, 12), slice(100, 232)):
            assert torch.equal(layers[0](x[rows]), whole[rows])


def test_models_without_routers_have_no_such_modules() -> None:
    for name in ("llama", "gpt2", "gemma3"):
        assert multiply_by_kernel(build_model(ARCHITECTURES[name]()), kernels_for("whole")) == 0
