"""Helpers of the tests of quantised models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.protocol.config import EngineConfig


def config(path: Path, quantize: str | None, **options: Any) -> EngineConfig:
    return EngineConfig(
        model_id=str(path),
        socket_path=path / "socket",
        device="cpu",
        num_threads=1,
        quantize=quantize,
        **options,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).std() / expected.std()).detach())


def compress(path: Path, without: str | None = None) -> None:
    """Rewrites a checkpoint in int8, in the format of compressed-tensors, without a tensor."""
    weights = path / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(weights).items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        scales = tensor.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (tensor / scales).round().to(torch.int8)
        tensors[f"{name}_scale"] = scales
    tensors.pop(without or "", None)
    save_file(tensors, weights, metadata={"format": "pt"})
    group = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    described = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group}},
    }
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = described
    (path / "config.json").write_text(json.dumps(settings))
