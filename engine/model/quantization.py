"""Chooses the quantisation for a name, checks that it is available, and applies it to a model.

Some names quantise any checkpoint after loading; the layers are in `quantized_linear.py`,
`kernels/int8.py`, `kernels/grouped_int8.py` and `kernels/int4.py`. So does a dtype that the CPU
multiplies in pairs, with `kernels/bfloat16.py`. The others say how a checkpoint is quantised
already; transformers loads those. The reasons: docs/decisions/2026-11-23-quantised-weights.md.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ..kernels import cpu as cpu_kernels
from ..kernels.bfloat16 import PackedBfloat16Linear
from ..kernels.grouped_int8 import GroupedInt8Linear, int8_linear
from ..kernels.int4 import PackedInt4Linear
from ..kernels.int8 import MAX_IN_FEATURES
from ..kernels.packed_linear import is_linear, output_rows
from ..protocol.config import EngineConfig
from ..shards.layers import plain
from .experts import matrices_of, pack_experts, rows_of
from .input_weights import use_interface
from .layers import parents_of_layers
from .quantized_linear import Fp8Linear, Int4Linear, Int8Linear

logger = logging.getLogger(__name__)

# TGI's names for quantising while loading, and our scheme with the same number of bits.
_EQUIVALENTS = {
    "eetq": "int8",
    "bitsandbytes": "int8",
    "bitsandbytes-nf4": "int4",
    "bitsandbytes-fp4": "int4",
}
_ANEW = frozenset({"int8", "int4"})  # also where a checkpoint's own bits are dequantised
_ON_LOADING = frozenset({"int8", "int4", "fp8", *_EQUIVALENTS})
# The `quant_method`s of checkpoints that a name accepts; by default the name itself.
_METHODS = {
    "fp8": frozenset({"fp8", "fbgemm_fp8"}),
    "marlin": frozenset({"marlin", "gptq"}),
    "bitsandbytes-nf4": frozenset({"bitsandbytes"}),
    "bitsandbytes-fp4": frozenset({"bitsandbytes"}),
}
_PACKAGES = {
    "awq": ("accelerate", "gptqmodel"),
    "bitsandbytes": ("accelerate", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
}
_DEQUANTIZED = {"fp8": 8, "mxfp4": 4}  # methods that a CPU does not multiply, and their bits
_PAIRS = "bfloat16"  # the dtype whose products are of pairs
_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to quantise linear layers.

    Attributes:
        name: int8, int4, fp8 or bfloat16.
        make: makes the quantised layer that replaces a layer.
        fits: whether a weight [N, K] can be multiplied in this format.
        otherwise: the scheme of weights that cannot; None to leave them.
        output: the scheme of the output layer; None to leave it. Embeddings are always left.
        kernels: on a CPU, kernels whose layers multiply experts of mixtures; None to leave these.
    """

    name: str
    make: Callable[[nn.Module], nn.Module]
    fits: Callable[[Tensor], bool]
    otherwise: Scheme | None = None
    output: Scheme | None = None
    kernels: cpu_kernels.CpuKernels | None = None

    @property
    def setting(self) -> str:
        """What asks for it, for messages."""
        return f"{'dtype' if self.name == _PAIRS else 'quantize'}={self.name}"

    def of_layer(self, layer: nn.Module, *, is_output: bool) -> Scheme | None:
        """The scheme for a layer, if it is quantised."""
        scheme = self.output if is_output else self
        return scheme.of_weight(output_rows(layer)) if scheme and is_linear(layer) else None

    def make_fitting(self, layer: nn.Module) -> nn.Module:
        """Makes the quantised layer that replaces a layer, in the format that its weight fits.

        Raises:
            ValueError: it fits none.
        """
        scheme = self.of_weight(output_rows(layer))
        if scheme is None:
            raise ValueError(f"a weight {[*output_rows(layer).shape]} does not fit {self.name}")
        return scheme.make(layer)

    def of_weight(self, weight: Tensor) -> Scheme | None:
        """The scheme for a weight [N, K]: this one if it fits, or another one."""
        if self.fits(weight):
            return self
        return self.otherwise and self.otherwise.of_weight(weight)

    def takes_experts(self, layer: nn.Module) -> bool:
        """Whether the matrices of a module of experts are quantised."""
        matrices = matrices_of(layer) if self.kernels else {}
        return bool(matrices) and all(
            matrix.dtype is torch.float32 and self.of_weight(rows_of(layer, matrix)[0])
            for matrix in matrices.values()
        )


def choose(
    config: EngineConfig, model_config: Any, device: torch.device, dtype: torch.dtype
) -> Scheme | None:
    """The scheme to apply to a model after loading; None if there is nothing to do.

    Args:
        config: its `quantize` is the name.
        model_config: of transformers, before the weights are loaded; for a quantised checkpoint it
            may be changed, so that transformers loads it in the way that suits the device. Where
            that dequantises its weights, they may be quantised anew.
        device: where the model will run.
        dtype: of weights that are not quantised.

    Raises:
        ValueError: it is not available; the message is one line and says what is missing.
    """
    if getattr(model_config, "quantization_config", None) is not None:
        _prepare_checkpoint(config.quantize, model_config, device)
        if config.quantize not in _ANEW:
            return None
    if _multiplies_pairs(config, device, dtype):
        return _bfloat16()
    if config.quantize is None:
        return None
    if config.quantize not in _ON_LOADING:
        raise ValueError(
            f"quantize={config.quantize} is for checkpoints that were quantised with it, and the "
            "config.json of this one has no quantization_config; use int8, int4 or fp8"
        )
    name = _EQUIVALENTS.get(config.quantize, config.quantize)
    if name != config.quantize:
        logger.warning("--quantize %s: served with %s, our own", config.quantize, name)
    return _scheme(name, config, device, dtype)


def apply(
    model: PreTrainedModel, scheme: Scheme, left: Collection[nn.Module] = ()
) -> dict[str, float]:
    """Replaces a model's linear layers in place, freeing weights as it goes.

    If another module holds a weight too (tied embeddings), it keeps the original.

    Args:
        model: the model.
        scheme: how.
        left: layers that stay as they are.

    Returns:
        The share of the weights that are quantised, 0 … 1, by the name of the format.

    Raises:
        ValueError: no layer can be quantised.
    """
    if scheme.kernels is not None:
        use_interface(model)
    layers = parents_of_layers(model)
    output = plain(model.get_output_embeddings())  # type: ignore[no-untyped-call]
    chosen = [
        (layer, found)
        for layer in layers
        if layer not in left
        and (found := scheme.of_layer(layer, is_output=layer is output)) is not None
    ]
    mixtures = [layer for layer in layers if scheme.takes_experts(layer)]
    if not chosen and not mixtures:
        raise ValueError(f"{type(model).__name__} has no layer that fits {scheme.name}")
    counts: Counter[str] = Counter()
    for layer, found in chosen:
        counts[found.name] += output_rows(layer).numel()
    for layer in mixtures:
        counts.update(_counts_of_experts(layer, scheme))
    while chosen:
        layer, found = chosen.pop()
        replacement = found.make(layer).train(layer.training)
        for parent, name in layers.pop(layer):
            setattr(parent, name, replacement)
    for layer in mixtures:
        assert scheme.kernels is not None
        experts = pack_experts(layer, scheme.make_fitting, scheme.kernels).train(layer.training)
        for parent, name in layers[layer]:
            setattr(parent, name, experts)
    num_others = sum(parameter.numel() for parameter in model.parameters())
    for name, num_weights in counts.items():
        logger.info("quantised to %s: %.1f million weights", name, num_weights / 1e6)
    logger.info("not quantised: %.1f million weights", num_others / 1e6)
    if num_kept := sum(isinstance(module, GroupedInt8Linear) for module in model.modules()):
        logger.info("%d layers keep the 8 bits and the scales that they were stored in", num_kept)
    total = counts.total() + num_others
    return {name: num_weights / total for name, num_weights in counts.items()}


def _counts_of_experts(layer: nn.Module, scheme: Scheme) -> Counter[str]:
    """How many weights of a module of experts are quantised, by the name of the format."""
    counts: Counter[str] = Counter()
    for matrix in matrices_of(layer).values():
        found = scheme.of_weight(rows_of(layer, matrix)[0])
        assert found is not None
        counts[found.name] += matrix.numel()
    return counts


def _scheme(name: str, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Scheme:
    if name == "int8":
        return _int8(config, device, dtype)
    if name == "int4":
        return _int4(config, device, dtype)
    if not multiplies_fp8(device):
        raise ValueError(
            "quantize=fp8 needs a GPU that multiplies it (Ada, Hopper or later); use int8"
        )
    return Scheme("fp8", Fp8Linear.from_linear, Fp8Linear.fits)


def _int8(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Scheme:
    """The layer in compiled C where it runs, otherwise torch's; both give the same integers.

    Only the former keeps weights that have 8 bits already: torch's product adds up whole rows, so
    it takes no scale for each 32 weights.
    """
    kernels = kernels_of(config, device, dtype)
    if kernels is None:
        plain = Scheme("int8", Int8Linear.from_linear, Int8Linear.fits)
        return replace(plain, output=plain)

    def make(layer: nn.Module) -> nn.Module:
        return int8_linear(layer, kernels)

    def fits(weight: Tensor) -> bool:
        return weight.shape[1] <= MAX_IN_FEATURES

    native = Scheme("int8", make, fits, kernels=kernels)
    return replace(native, output=native)


def _int4(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Scheme:
    """The layer in compiled C where it runs, otherwise torch's.

    With the former the output layer has 8 bits, and so have layers without whole groups.
    """
    kernels = kernels_of(config, device, dtype)
    if kernels is None:
        return Scheme("int4", Int4Linear.from_linear, Int4Linear.fits)

    def make(layer: nn.Module) -> nn.Module:
        return PackedInt4Linear.from_linear(layer, kernels)

    int8 = _int8(config, device, dtype)
    return Scheme("int4", make, PackedInt4Linear.fits, int8, int8, kernels)


def _multiplies_pairs(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model in bfloat16 runs on a CPU that multiplies it.

    Its linear layers round what they multiply then, too; all else is as on other CPUs.
    """
    if config.dtype != _PAIRS or config.quantize is not None:
        return False
    kernels = kernels_of(config, device, dtype)
    return kernels is not None and kernels.multiplies_pairs


def _bfloat16() -> Scheme:
    scheme = Scheme(_PAIRS, PackedBfloat16Linear.from_linear, lambda _: True)
    return replace(scheme, output=scheme)


def kernels_of(
    config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> cpu_kernels.CpuKernels | None:
    """The compiled kernels, where a model's layers can use them."""
    native = config.enable_native_kernels and device.type == "cpu" and dtype is torch.float32
    return cpu_kernels.load() if native else None


def _method(described: dict[str, Any]) -> str:
    if described.get("load_in_8bit") or described.get("load_in_4bit"):
        return "bitsandbytes"  # its configurations may lack a method
    return str(described.get("quant_method"))


def _prepare_checkpoint(name: str | None, model_config: Any, device: torch.device) -> None:
    """Checks a quantised checkpoint, and sets how transformers loads it on the device.

    Raises:
        ValueError: it is not in the format of `name`, or cannot be loaded.
    """
    described = _description(model_config)
    method = _method(described)
    if method == "compressed-tensors":
        model_config.quantization_config = described | _loading_options(described, device)
    is_anew = name in _ANEW and stored_bits(model_config, device) is not None
    if name is not None and not is_anew and method not in _METHODS.get(name, {name}):
        raise ValueError(f"the checkpoint is quantised already ({method}), not with {name}")
    _check_loadable(method)


def stored_bits(model_config: Any, device: torch.device) -> int | None:
    """Bits of a quantised checkpoint's weights that are dequantised while they are loaded.

    The fewest, where layers differ. None if they stay as they are, or nothing is quantised.
    """
    if getattr(model_config, "quantization_config", None) is None:
        return None
    described = _description(model_config)
    method = _method(described)
    if method == "compressed-tensors":
        if not (described | _loading_options(described, device)).get("dequantize"):
            return None
        return min((int(group.get("num_bits", 8)) for group in _groups(described)), default=8)
    return _DEQUANTIZED.get(method) if device.type == "cpu" else None


def _description(model_config: Any) -> dict[str, Any]:
    """What a configuration says of how a checkpoint is quantised."""
    described = model_config.quantization_config
    plain = described if isinstance(described, dict) else described.to_dict()
    assert isinstance(plain, dict)
    return plain


def _groups(described: dict[str, Any]) -> list[dict[str, Any]]:
    """How the weights of each group of layers of compressed-tensors are quantised.

    Raises:
        ValueError: it does not say so.
    """
    groups = described.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(f"quantization_config.config_groups has no objects. Given: {groups!r}")
    found = [group.get("weights") or {} for group in groups.values()]
    for weights in found:
        if not isinstance(weights, dict) or type(weights.get("num_bits", 8)) is not int:
            raise ValueError(
                "quantization_config.config_groups: weights.num_bits must be an integer. "
                f"Given: {weights!r}"
            )
    return found


def _check_loadable(method: str) -> None:
    """Checks that transformers can load checkpoints of a method.

    Raises:
        ValueError: it cannot, or packages are missing.
    """
    # transformers lists bitsandbytes as two methods, with suffixes.
    if not any(
        known == method or known.startswith(f"{method}_") for known in AUTO_QUANTIZER_MAPPING
    ):
        raise ValueError(
            f"transformers does not load checkpoints that were quantised with {method} "
            "(quantization_config.quant_method)"
        )
    missing = [package for package in _PACKAGES.get(method, ()) if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"the checkpoint was quantised with {method}, and packages that are needed to load it "
            f"are not installed: {', '.join(missing)}"
        )


def _loading_options(described: dict[str, Any], device: torch.device) -> dict[str, bool]:
    """Options for compressed-tensors: weights stay in fp8 if the device multiplies fp8.

    Otherwise they are dequantised while loading. By default, transformers does that in the first
    step. The fp8 path has not been run on a GPU yet.
    """
    groups = _groups(described)
    is_fp8 = all(group.get("type") == "float" and group.get("num_bits") == 8 for group in groups)
    if is_fp8 and multiplies_fp8(device):
        return {"use_optimized_inference": True}
    return {"dequantize": True}


def multiplies_fp8(device: torch.device) -> bool:
    """Whether it is a GPU with instructions for products of fp8_e4m3fn."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
