"""Packs the experts of mixtures for the CPU kernels, quantised or not.

transformers keeps a matrix of all experts of a layer in one parameter [num_experts, N, K], which no
linear layer holds. Here the matrices become one packed layer, and rows are sorted by expert, so
that a kernel multiplies those of all experts in one call. Nothing reads the routing on the host: a
step can be recorded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.cpu import CpuKernels
from ..kernels.packed_linear import PackedLinear
from .fusion import gate_like, kernels_for_fusion
from .input_weights import use_interface
from .layers import parents_of_layers

_MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts")
Make = Callable[[nn.Module], nn.Module]  # of a linear layer one for the kernels


class PackedExperts(nn.Module):
    """Stands for the experts of a layer.

    Args:
        stock: of transformers, whose weights are freed; what is between the products is still its.
        up: the first products of all experts, a layer that takes the ends of their rows.
        down: the second ones.
        kernels: that sort rows and weigh them.
    """

    stock: Any

    def __init__(
        self, stock: nn.Module, up: nn.Module, down: nn.Module, kernels: CpuKernels
    ) -> None:
        super().__init__()
        self.stock = stock
        self.up = up
        self.down = down
        self._gate = _gate_of(stock)
        self._kernels = kernels
        self._has_norm = getattr(stock, "has_post_expert_norm", False)  # which older versions lack
        self._forward_hooks.update(stock._forward_hooks)  # such as a sum over ranks

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sums of the chosen experts' results, [num_tokens, width].

        Args:
            hidden_states: fp32 [num_tokens, width].
            index: int64 [num_tokens, top_k], the experts of each token.
            weights: of the same shape.
        """
        kernels, index = self._kernels, index.long().contiguous()
        ends, tokens, places = kernels.sort_by_expert(index, self.stock.num_experts)
        rows = kernels.take_rows(hidden_states.contiguous(), tokens)
        results: Tensor = self.down(self._gate(self.up(rows, ends)), ends)
        if self._has_norm:
            results = self.stock.post_expert_norm(results)
        return kernels.weigh_rows(results, places, weights.float().contiguous())


class PackedMatrix(nn.Module):
    """Stands for one matrix of all experts of a layer, as JetMoE has them.

    Args:
        layer: that takes the ends of the experts' rows.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """Return the products of rows with their experts' matrices.

        Args:
            inputs: fp32 [num_rows, K], sorted by expert.
            expert_size: how many rows each expert has.
        """
        found: Tensor = self.layer(inputs, torch.tensor(expert_size).cumsum(0))
        return found


def matrices_of(module: nn.Module) -> dict[str, Tensor]:
    """The two matrices of experts [num_experts, N, K], or [num_experts, K, N], by their names.

    One for a module that has one. Empty for other modules, and for experts that have more
    parameters than transformers' interface of experts knows.
    """
    stock: Any = module
    if _has_one_matrix(stock):
        return {"weight": stock.weight.detach()}
    is_divided = getattr(stock, "_is_expert_parallel", False)  # older versions do not divide them
    if is_divided or not all(hasattr(stock, mark) for mark in _MARKS):
        return {}
    names = ("gate_up_proj" if stock.has_gate else "up_proj", "down_proj")
    wanted = {*names, *(f"{name}_bias" for name in names if stock.has_bias)}
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != wanted or any(own[name].dim() != 3 for name in names):
        return {}
    return {name: own[name].detach() for name in names}


def _has_one_matrix(stock: Any) -> bool:
    """Whether a module multiplies rows that are sorted by expert, and does nothing else."""
    own = dict(stock.named_parameters(recurse=False))
    names = ("num_experts", "output_size", "input_size")
    sizes = tuple(getattr(stock, name, None) for name in names)
    if own.keys() != {"weight"} or own["weight"].shape != sizes:
        return False
    return [*inspect.signature(stock.forward).parameters] == ["inputs", "expert_size"]


def _are_fp32(stock: nn.Module) -> bool:
    matrices = matrices_of(stock).values()
    return bool(matrices) and all(matrix.dtype is torch.float32 for matrix in matrices)


def rows_of(stock: Any, matrices: Tensor) -> Tensor:
    """Matrices of experts as [num_experts, N, K]."""
    return matrices.transpose(1, 2) if getattr(stock, "is_transposed", False) else matrices


def pack_mixtures(model: nn.Module, kernels: CpuKernels) -> int:
    """Packs the fp32 matrices of all experts of a model, in place, freeing them as it goes.

    Returns:
        How many layers have experts that are packed now.
    """

    def make(linear: nn.Module) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        return PackedLinear.from_linear(linear, kernels)

    use_interface(model)
    num_packed = 0
    for stock, places in parents_of_layers(model).items():
        if not _are_fp32(stock):
            continue
        experts = pack_experts(stock, make, kernels).train(stock.training)
        for parent, name in places:
            setattr(parent, name, experts)
        num_packed += 1
    return num_packed


def pack_experts(stock: nn.Module, make: Make, kernels: CpuKernels) -> PackedExperts | PackedMatrix:
    """Packs the matrices of experts, and frees them.

    Args:
        stock: of which `matrices_of` knows the matrices.
        make: packs a linear layer for the kernels, quantised or not.
        kernels: whose panels hold the outputs of one expert each.
    """
    first, *others = (_layer_of(stock, name, make, kernels) for name in matrices_of(stock))
    return PackedExperts(stock, first, others[0], kernels) if others else PackedMatrix(first)


def _layer_of(stock: Any, name: str, make: Make, kernels: CpuKernels) -> nn.Module:
    """A layer of one matrix of all experts."""
    rows = rows_of(stock, getattr(stock, name).detach())
    has_bias = getattr(stock, "has_bias", False)
    bias = getattr(stock, f"{name}_bias").detach() if has_bias else None
    layer = layer_of_matrices(rows, bias, make, kernels)
    for part in (name, f"{name}_bias") if has_bias else (name,):
        delattr(stock, part)
    return layer


def layer_of_matrices(
    rows: Tensor, bias: Tensor | None, make: Make, kernels: CpuKernels
) -> nn.Module:
    """A layer of several matrices, one after the other, padded to whole panels.

    Args:
        rows: the matrices [num, N, K].
        bias: their biases [num, N].
        make: packs a linear layer for the kernels, quantised or not.
        kernels: whose panels hold the outputs of one matrix each.
    """
    missing = -rows.shape[1] % kernels.panel_width
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    weight = F.pad(rows, (0, 0, 0, missing)) if missing else rows
    linear.weight = nn.Parameter(weight.flatten(0, 1), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(F.pad(bias, (0, missing)).flatten(), requires_grad=False)
    layer: Any = make(linear)
    layer.out_features = rows.shape[1]  # of one matrix
    assert isinstance(layer, nn.Module)
    return layer


def _gate_of(stock: Any) -> Callable[[Tensor], Tensor]:
    """What is between the products: a kernel where one computes the same, otherwise the stock's.

    Torch's activations compute a row otherwise than others at the end of a thread's share.
    """
    gate: Callable[[Tensor], Tensor] = stock._apply_gate if stock.has_gate else stock.act_fn
    fused = kernels_for_fusion(torch.device("cpu"), torch.float32) if stock.has_gate else None
    if fused is None:
        return gate
    return gate_like(gate, fused.gates, torch.device("cpu")) or gate
