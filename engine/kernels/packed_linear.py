"""Linear layers whose weights are packed for the CPU kernels."""

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from .cpu import CpuKernels, required
from .cpu_low_rank import Updates
from .formats import exact_dtype

_ROWS_AT_ONCE = 64  # of a weight that are looked at before the next: most that do not fit show it


class PackedLinear(nn.Module):
    """Replaces nn.Linear for inference; holds panels of the weight instead of the weight.

    Weights that 16 bits hold exactly are kept in them; everything else is fp32.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self, kernels: CpuKernels, packed: Tensor, bias: Tensor | None, out_features: int
    ) -> None:
        """Take over panels made by `CpuKernels.pack_weight`."""
        super().__init__()
        self.in_features = packed.shape[1]
        self.out_features = out_features
        self._kernels = kernels
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, kernels: CpuKernels | None = None) -> Self:
        """Pack the weight of an fp32 layer; the layer itself is left as it is.

        Raises:
            RuntimeError: there are no kernels on this machine.
        """
        kernels = kernels or required()
        bias = None if linear.bias is None else linear.bias.detach().contiguous()
        packed = kernels.pack_weight(narrowed(linear.weight, kernels))
        return cls(kernels, packed, bias, linear.out_features)

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias; of experts by the ends of their rows."""
        return self._kernels.linear(x, self.packed, self.bias, self.out_features, ends)

    def adapted(self, x: Tensor, slots: Tensor, updates: Updates) -> Tensor:
        """Return the same with the updates in each row's slot added."""
        return self._kernels.adapted_linear(
            x, self.packed, self.bias, self.out_features, slots, updates
        )

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class PackReport(NamedTuple):
    """What `pack_model` did; sizes in bytes."""

    num_layers: int
    packed_bytes: int
    # copies of weights that other modules keep (embeddings tied to the output layer), and padding
    extra_bytes: int


def pack_model(
    model: nn.Module, kernels: CpuKernels, left: Collection[nn.Module] = ()
) -> PackReport:
    """Replace every fp32 nn.Linear (and GPT-2's Conv1D) in place, freeing weights as it goes.

    If another module holds a weight too (tied embeddings), it keeps the original. Layers that share
    one weight share one packed copy. Those in `left` stay as they are.
    """

    def is_packed(layer: nn.Module) -> bool:
        return _can_pack(layer) and layer not in left

    layers = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_packed(child)
    ]
    uses = Counter(id(getattr(parent, name).weight) for parent, name in layers)
    kept = {
        id(parameter)
        for module in model.modules()
        if not is_packed(module)
        for parameter in module.parameters(recurse=False)
    }
    shared: dict[int, Tensor] = {}
    packed_bytes = extra_bytes = 0
    for parent, name in layers:
        layer = getattr(parent, name)
        key = id(layer.weight)
        packed = shared.get(key)
        if packed is None:
            packed = kernels.pack_weight(narrowed(output_rows(layer), kernels))
            packed_bytes += packed.nbytes
            extra_bytes += packed.nbytes - (0 if key in kept else layer.weight.nbytes)
        if uses[key] > 1:
            shared[key] = packed
        bias = None if layer.bias is None else layer.bias.detach().contiguous()
        replacement = PackedLinear(kernels, packed, bias, output_rows(layer).shape[0])
        setattr(parent, name, replacement.train(layer.training))
        del layer  # the last reference to an untied weight
    return PackReport(len(layers), packed_bytes, extra_bytes)


def narrowed(weight: Tensor, kernels: CpuKernels) -> Tensor:
    """The weight in 16 bits if they hold each of its values exactly, otherwise as it is.

    That is so for most checkpoints: they were saved in bfloat16 or float16. Results stay the same,
    and half the bytes are read.
    """
    weight = weight.detach()
    formats = (torch.bfloat16, torch.float16) if kernels.has_float16 else (torch.bfloat16,)
    return weight.to(exact_dtype(torch.split(weight, _ROWS_AT_ONCE), formats))


def is_linear(module: nn.Module) -> bool:
    """Whether it is exactly nn.Linear or GPT-2's Conv1D.

    Not a subclass of them, since other modules often read the weight of those.
    """
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _can_pack(module: nn.Module) -> bool:
    if not is_linear(module):
        return False
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def output_rows(layer: nn.Module) -> Tensor:
    """Return the weight as [N, K]; Conv1D keeps it as [K, N]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if type(layer) is nn.Linear else weight.t()
