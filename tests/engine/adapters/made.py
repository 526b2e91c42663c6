"""Adapters made by PEFT itself, and the tokens of the models that it merges them into."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engine.model.architectures import continuation

# Of different ranks, scales and layers; the last has another rank and alpha in some layers.
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "everything": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "stable": {
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["o_proj", "gate_proj", "down_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["k_proj", "up_proj", "q_proj"],
        "rank_pattern": {"k_proj": 7, "layers.0.self_attn.q_proj": 1},
        "alpha_pattern": {"up_proj": 9, "1.self_attn.k_proj": 2},
    },
}


@dataclass(frozen=True, slots=True)
class Made:
    """Directories of a model and of adapters for it."""

    model: Path
    adapters: dict[str, Path]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """As `EngineConfig` has them."""
        return tuple((name, str(path)) for name, path in self.adapters.items())


def make_adapter(model_path: Path, path: Path, seed: int, **settings: Any) -> Path:
    """Saves an adapter with random weights, large enough to change most tokens."""
    torch.manual_seed(seed)
    with _old_names():
        model = get_peft_model(_load(model_path), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.35)
    model.save_pretrained(path)
    return path


def make(model: PreTrainedModel, path: Path, settings: dict[str, dict[str, Any]]) -> Made:
    """Saves a model, and adapters for it by their settings."""
    model.save_pretrained(path / "model")
    adapters = {
        name: make_adapter(path / "model", path / name, seed, **given)
        for seed, (name, given) in enumerate(settings.items())
    }
    return Made(path / "model", adapters)


def merged_tokens(
    made: Made, name: str, prompts: list[tuple[int, ...]], num_tokens: int
) -> list[list[int]]:
    """The greedy continuations by PEFT's merged model; by the base model for an empty name."""
    model: Any = _load(made.model)
    if name:
        with _old_names():
            model = PeftModel.from_pretrained(model, made.adapters[name]).merge_and_unload()
    return [continuation(model, prompt, num_tokens) for prompt in prompts]


@contextmanager
def _old_names() -> Iterator[None]:
    """Lets PEFT call transformers by a name that is going to change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
