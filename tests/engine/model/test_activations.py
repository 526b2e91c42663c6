"""Activations for which a model calls torch are a kernel's, and do not depend on other tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.activations import activate_by_kernel
from tests.engine.native import kernels_for, threads


class Gated(nn.Module):
    """A layer that calls torch itself, around one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.other = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * self.act(x) + F.gelu(x, approximate="tanh") + self.other(x.sin())


class Calls(nn.Module):
    """Calls one function of a tensor."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def test_rows_are_those_of_torch_and_the_same_alone() -> None:
    layer, x = Gated(), torch.randn(301, 3) * 4
    expected = layer(x)
    assert activate_by_kernel(layer, kernels_for("whole"), lambda: layer(x)) == 2
    whole = layer(x)
    torch.testing.assert_close(whole, expected)
    for num_threads, rows in ((1, slice(7, 8)), (2, slice(3, 12)), (3, slice(100, 232))):
        with threads(num_threads):
            assert torch.equal(layer(x[rows]), whole[rows])


CALLS: dict[str, Any] = {
    "a module of its own": lambda x: nn.SiLU()(x),
    "torch.sigmoid": torch.sigmoid,
    "Tensor.sigmoid": Tensor.sigmoid,
    "F.sigmoid": F.sigmoid,
    "nn.Sigmoid": nn.Sigmoid(),
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "nn.GELU": nn.GELU("tanh"),
    "F.softplus": F.softplus,
}
OTHERS: dict[str, Any] = {
    "another function": torch.tanh,
    "another softplus": lambda x: F.softplus(x, beta=2.0),
    "another dtype": lambda x: torch.sigmoid(x.double()),
    "in place": lambda x: F.silu(x.clone(), inplace=True),
    "into a tensor": lambda x: torch.sigmoid(x, out=torch.empty_like(x)),
}


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
def test_every_way_to_call_torch_is_found(function: Any) -> None:
    layer, x = Calls(function), torch.randn(50, 3)
    assert activate_by_kernel(layer, kernels_for("whole"), lambda: layer(x)) == 1
    assert torch.equal(layer(x[7:8]), layer(x)[7:8])
    torch.testing.assert_close(layer(x), function(x))


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_what_a_kernel_does_not_compute_stays(function: Any) -> None:
    layer, x = Calls(function), torch.randn(50, 3)
    assert activate_by_kernel(layer, kernels_for("whole"), lambda: layer(x)) == 0
    assert torch.equal(layer(x), function(x))


def test_a_layer_that_fails_while_it_is_watched_leaves_nothing_behind() -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("broken")

    layer = nn.Sequential(Gated(), Calls(fail))
    with pytest.raises(RuntimeError, match="broken"):
        activate_by_kernel(layer, kernels_for("whole"), lambda: layer(torch.randn(4, 3)))
    assert "forward" not in vars(layer[0])
    other = Calls(torch.sigmoid)
    assert activate_by_kernel(other, kernels_for("whole"), lambda: other(torch.randn(4, 3))) == 1
