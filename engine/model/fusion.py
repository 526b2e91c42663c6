"""Replaces layers of a loaded model by fused ones, which compute the same in fewer operations.

Two kinds: RMS norms, which transformers computes in six operations and a kernel of ours in one; and
gated MLPs, whose gate and up projections become one matrix product, followed by one kernel for
act(gate) * up. Which fused kernel fits a layer is found out by trying: a layer is replaced by the
one that gives its results on random input, and stays if none does. Names only decide which layers
are tried.

Query, key and value are merged in `projections.py`, and norms with the additions before them in
`residual_norms.py`, both on a GPU only.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import cpu as cpu_kernels
from ..kernels import has_triton
from ..shards.layers import SummedLinear
from .layers import Replacements, merged_linear, parents_of_layers

logger = logging.getLogger(__name__)

Gate = Callable[[Tensor], Tensor]  # [..., 2 * width], gate and up, to [..., width]
_Layer = TypeVar("_Layer", bound=Callable[[Tensor], Tensor])

_SEPARATE = {"gate_proj", "up_proj", "down_proj"}
_MERGED = {"gate_up_proj", "down_proj"}
# Scales of random input. With the smallest an epsilon matters; products of it underflow in fp16.
_NORM_SCALES = (1e-3, 1.0, 4.0)
_MLP_SCALES = (1.0, 4.0)
_TOLERANCE = 1e-5  # of a row's norm, or two roundings in fp16 and bf16


@dataclass(frozen=True, slots=True)
class Norm:
    """The kernels of one kind of RMS norm.

    Attributes:
        plain: of x [..., width], weight [width], epsilon.
        of_sum: of x, an update of the same shape, weight and epsilon: the sum and its norm. None
            where there is no such kernel.
    """

    plain: Callable[[Tensor, Tensor, float], Tensor]
    of_sum: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class FusedKernels:
    """The fused kernels that are tried on each layer."""

    norms: tuple[Norm, ...]
    gates: tuple[Gate, ...]


@dataclass(slots=True)
class Fusion(Replacements):
    """What was replaced; the original layers share their weights with the new ones."""

    num_norms: int = 0
    num_mlps: int = 0


class FusedRMSNorm(nn.Module):
    """An RMS norm, x / rms(x) times a weight, computed by one kernel."""

    def __init__(self, norm: Norm, weight: Tensor, epsilon: float) -> None:
        """Take over the weight [width] of a norm."""
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon
        self._norm = norm
        self._ahead: tuple[Tensor, Tensor] | None = None

    @property
    def can_add(self) -> bool:
        """Whether `add` works here."""
        return self._norm.of_sum is not None

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """Return x + update [..., width], and keep its norm until `forward` gets that sum."""
        assert self._norm.of_sum is not None
        self._ahead = self._norm.of_sum(x, update, self.weight, self.epsilon)
        return self._ahead[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., width]."""
        ahead, self._ahead = self._ahead, None  # nothing is kept in memory until the next step
        if ahead is not None and ahead[0] is x:
            return ahead[1]
        return self._norm.plain(x, self.weight, self.epsilon)


class FusedMLP(nn.Module):
    """A gated MLP, down(act(gate) * up), where gate and up come from one matrix product.

    Its products are plain linear layers, which may be packed or quantised later. `merged` has the
    names of the layers that the first of them was made of; none if the model has it itself.
    """

    def __init__(
        self,
        gate_up_proj: nn.Linear,
        down_proj: nn.Module,
        gate: Gate,
        merged: tuple[str, ...] = (),
    ) -> None:
        """Take over the two linear layers."""
        super().__init__()
        self.merged = merged
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self._gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for x [..., hidden_size], of the same shape."""
        result = self.down_proj(self._gate(self.gate_up_proj(x)))
        assert isinstance(result, Tensor)
        return result


def kernels_for_fusion(device: torch.device, dtype: torch.dtype) -> FusedKernels | None:
    """The fused kernels for models of this dtype on this device, or None."""
    if device.type == "cuda":
        return _triton_kernels()
    kernels = cpu_kernels.load() if dtype is torch.float32 else None
    return None if kernels is None else _native_kernels(kernels)


@torch.no_grad()
def fuse(model: nn.Module, kernels: FusedKernels) -> Fusion:
    """Replaces every layer for which there is a fused one, in a model in evaluation mode."""
    fusion = Fusion()
    layers = parents_of_layers(model)
    uses = _uses_of_weights(layers)
    for layer, parents in layers.items():
        if not _is_plain(layer) or any(uses[id(weight)] > 1 for weight in layer.parameters()):
            continue
        replacement: nn.Module | None
        if (replacement := _fused_norm(layer, kernels.norms)) is not None:
            fusion.num_norms += 1
        elif (replacement := _fused_mlp(layer, kernels.gates)) is not None:
            fusion.num_mlps += 1
        else:
            continue
        replacement.train(layer.training)
        for parent, name in parents:
            fusion.put(parent, name, replacement)
    return fusion


def _uses_of_weights(layers: dict[nn.Module, list[tuple[nn.Module, str]]]) -> Counter[int]:
    """How often each parameter occurs in a model, by its id."""
    return Counter(
        id(parameter)
        for layer, parents in layers.items()
        for parameter in layer.parameters(recurse=False)
        for _ in parents
    )


def _native_kernels(kernels: cpu_kernels.CpuKernels) -> FusedKernels:
    """Kernels for a CPU. All are fp32, in which the order of roundings does not matter.

    None is of torch: it computes the numbers at the end of each thread's share by other formulas,
    so that a row's result would depend on the rows with it.
    """

    def gate(gated: Callable[[Tensor, Tensor], Tensor], merged: Tensor) -> Tensor:
        rows, width = merged.flatten(0, -2), merged.shape[-1] // 2
        left, right = rows.narrow(-1, 0, width), rows.narrow(-1, width, width)
        return gated(left, right).view(*merged.shape[:-1], width)

    norms = (Norm(partial(kernels.rms_norm, weight_offset=offset)) for offset in (0.0, 1.0))
    gates = (partial(gate, gated) for gated in (kernels.silu_and_mul, kernels.gelu_and_mul))
    return FusedKernels(tuple(norms), tuple(gates))


def _triton_kernels() -> FusedKernels | None:
    if not has_triton():
        return None
    from ..kernels.triton_elementwise import ACTIVATIONS, add_rms_norm, gated, rms_norm

    def norm(weight_offset: float, *, rounds_early: bool) -> Norm:
        return Norm(
            partial(rms_norm, weight_offset=weight_offset, rounds_early=rounds_early),
            partial(add_rms_norm, weight_offset=weight_offset, rounds_early=rounds_early),
        )

    return FusedKernels(
        norms=(
            norm(0.0, rounds_early=True),  # Llama
            norm(0.0, rounds_early=False),  # OLMo 2
            norm(1.0, rounds_early=False),  # Gemma
        ),
        gates=tuple(partial(gated, activation=activation) for activation in ACTIVATIONS),
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer takes one tensor and nothing else, and has no hooks."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return not hooks and len(inspect.signature(layer.forward).parameters) == 1


def _fused_norm(layer: nn.Module, norms: Iterable[Norm]) -> FusedRMSNorm | None:
    """A fused norm for a layer whose only tensor is a weight [width], if one gives its results.

    Which of the layer's numbers is the epsilon is found out by trying as well.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not weight.is_floating_point():
        return None
    if len(list(layer.parameters())) > 1 or any(True for _ in layer.buffers()):
        return None
    epsilons = [value for value in vars(layer).values() if isinstance(value, float)]
    x, exact = random_rows(weight, _NORM_SCALES), deepcopy(layer).float()
    candidates = [
        FusedRMSNorm(norm, weight, epsilon)
        for norm, epsilon in itertools.product(norms, epsilons)
        # In fp32 other formulas differ, and in the layer's own dtype other orders of roundings.
        if _closest(exact, [FusedRMSNorm(norm, weight.float(), epsilon)], x.float()) is not None
    ]
    return _closest(layer, candidates, x)


def _fused_mlp(layer: nn.Module, gates: Iterable[Gate]) -> FusedMLP | None:
    """A fused MLP for a layer of two or three linear layers and an activation, if one fits."""
    parts = {name: part for name, part in layer.named_children() if _linear_of(part) is not None}
    others = [child for child in layer.children() if child not in parts.values()]
    num_tensors = sum(1 for part in parts.values() for _ in part.parameters())
    if len(others) != 1 or len([*layer.parameters(), *layer.buffers()]) != num_tensors:
        return None
    if parts.keys() not in (_SEPARATE, _MERGED):
        return None
    products = {name: product for name, part in parts.items() if (product := _linear_of(part))}
    gate = _gate_with(others[0], gates, products["down_proj"].weight.device)
    if gate is None:
        return None
    gate_up_proj = _gate_up_proj(products)
    if gate_up_proj is None:
        return None
    x = random_rows(gate_up_proj.weight, _MLP_SCALES)
    merged = ("gate_proj", "up_proj") if products.keys() == _SEPARATE else ()
    return _closest(layer, [FusedMLP(gate_up_proj, parts["down_proj"], gate, merged)], x)


def _linear_of(layer: nn.Module) -> nn.Linear | None:
    """The linear layer that a layer is, or of which it sums the ranks' results; None for others."""
    layer = layer.local if isinstance(layer, SummedLinear) else layer
    return layer if _is_linear(layer) else None


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is exactly nn.Linear, without the scales of quantised checkpoints."""
    names = {name for name, _ in layer.named_parameters()}
    return type(layer) is nn.Linear and names <= {"weight", "bias"} and _is_plain(layer)


def _gate_with(activation: nn.Module, gates: Iterable[Gate], device: torch.device) -> Gate | None:
    """The gate with this activation. In fp32: fp16 and bf16 hardly tell variants of GELU apart."""

    def expected(merged: Tensor) -> Tensor:
        gate, up = merged.chunk(2, dim=-1)
        result = activation(gate) * up
        assert isinstance(result, Tensor)
        return result

    return gate_like(expected, gates, device)


def gate_like(
    expected: Callable[[Tensor], object], gates: Iterable[Gate], device: torch.device
) -> Gate | None:
    """The gate that computes the same of fp32 [..., 2 * width], if one does."""
    slope = torch.linspace(-4.0, 4.0, 64, device=device)
    return _closest(expected, gates, torch.cat([slope, 1.0 - slope]).unsqueeze(0))


def _gate_up_proj(products: dict[str, nn.Linear]) -> nn.Linear | None:
    """The layer that computes gate and up at once; None if they cannot be merged."""
    if products.keys() == _MERGED:
        return products["gate_up_proj"]
    gate, up = products["gate_proj"], products["up_proj"]
    if gate.weight.shape != up.weight.shape or gate.weight.dtype != up.weight.dtype:
        return None
    return merged_linear((gate, up)) if (gate.bias is None) == (up.bias is None) else None


def _closest(
    layer: Callable[[Tensor], object], candidates: Iterable[_Layer], x: Tensor
) -> _Layer | None:
    """The candidate whose result for x is closest to the layer's, if it is close enough."""
    expected = _result(layer, x)
    if expected is None:
        return None
    best: _Layer | None = None
    least = max(_TOLERANCE, 2 * torch.finfo(x.dtype).eps)
    for candidate in candidates:
        try:
            error = error_of_rows(candidate(x.clone()), expected)
        except Exception:  # for example no working compiler: the model is served without it
            logger.debug("no kernel for %s", layer, exc_info=True)
            continue
        if error < least:
            best, least = candidate, error
    return best


def _result(layer: Callable[[Tensor], object], x: Tensor) -> Tensor | None:
    """The tensor that a layer computes from x; None if it takes or gives something else."""
    try:
        result = layer(x.clone())
    except Exception:  # it needs other inputs, so it is another kind of layer
        return None
    return result if isinstance(result, Tensor) else None


def random_rows(weight: Tensor, scales: tuple[float, ...]) -> Tensor:
    """Random rows [1, len(scales), width] for a weight [..., width]; their means are not 0."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, len(scales), weight.shape[-1], generator=generator) + 0.5
    return (rows * torch.tensor(scales).unsqueeze(1)).to(weight)


def error_of_rows(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a row: the norm of its difference, as a share of the row's norm."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return float("inf")
    expected = expected.float()
    differences = (actual.float() - expected).norm(dim=-1)
    return float((differences / expected.norm(dim=-1)).max())
