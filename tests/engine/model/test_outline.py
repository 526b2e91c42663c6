"""What a checkpoint says of itself is refused before its weights are loaded: here are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV32Config,
    GPT2Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    PretrainedConfig,
    Qwen3Config,
)

from engine.adapters.peft_directory import CONFIG_NAME, WEIGHTS_NAME
from engine.computation.computation import build_computation
from engine.model import outline
from engine.model.outline import check_outline
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.shards.group import Group
from tests.engine.adapters.made import make_adapter
from tests.engine.model.architectures import SMALL, build_model

_NO_WEIGHTS = "no file named model.safetensors"  # what loading would say
_ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def _gather(_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the ranks exchange something")


def _config(path: Path, model: PretrainedConfig, **options: Any) -> EngineConfig:
    model.architectures = ["_"]
    model.save_pretrained(path)
    return EngineConfig(
        model_id=str(path), socket_path=path / "socket", device="cpu", num_threads=1, **options
    )


def _refusal(config: EngineConfig, num_ranks: int = 1) -> str:
    """Why a configuration is refused; all ranks would say the same."""
    group = Group(num_ranks - 1, num_ranks, _gather) if num_ranks > 1 else None
    with pytest.raises(ModelLoadError) as caught:
        build_computation(config, group=group)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_weights_nothing_is_loaded(tmp_path: Path) -> None:
    assert _NO_WEIGHTS in _refusal(_config(tmp_path, LlamaConfig(**SMALL)))
    assert _NO_WEIGHTS in _refusal(_config(tmp_path, LlamaConfig(**SMALL)), num_ranks=2)


@pytest.mark.parametrize(
    ("model", "num_ranks", "reason", "advice"),
    [
        (
            LlamaConfig(**SMALL),
            3,
            "its 4 heads of model.layers.0.self_attn.q_proj cannot be divided among 3 ranks",
            "it can be divided by --num-shard 2 or 4",
        ),
        (
            Qwen3Config(
                **SMALL | {"num_attention_heads": 6, "num_key_value_heads": 3}, head_dim=16
            ),
            2,
            "its 3 heads of model.layers.0.self_attn.k_proj cannot be divided among 2 ranks",
            "it can be divided by --num-shard 3 or 6",
        ),
        (
            LlamaConfig(**SMALL | {"intermediate_size": 90}),
            4,
            "90 of model.layers.0.mlp.gate_proj cannot be divided among 4 ranks",
            "it can be divided by --num-shard 2",
        ),
        (
            MixtralConfig(**SMALL | {"intermediate_size": 95}, num_local_experts=4),
            2,
            "95 of model.layers.0.mlp.experts.gate_up_proj cannot be divided among 2 ranks",
            "--num-shard 1 serves it whole, and --replicas several times",
        ),
        (
            GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4),
            2,
            "transformers has no plan of how its layers are divided",
            "--num-shard 1 serves it whole, and --replicas several times",
        ),
        (
            MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2),
            2,
            "transformers has no plan of how its layers are divided",
            "--num-shard 1 serves it whole, and --replicas several times",
        ),
        (
            GraniteMoeHybridConfig(
                **SMALL, num_local_experts=0, layer_types=["mamba", "attention", "mamba"]
            ),
            2,
            "transformers has no plan of how its layers are divided",
            "--num-shard 1 serves it whole, and --replicas several times",
        ),
    ],
    ids=["heads", "key heads", "widths", "experts", "gpt2", "mamba", "granite hybrid"],
)
def test_a_model_that_cannot_be_divided(
    model: PretrainedConfig, num_ranks: int, reason: str, advice: str, tmp_path: Path
) -> None:
    text = _refusal(_config(tmp_path, model), num_ranks)
    assert text.startswith(f"cannot load {tmp_path}: {reason}")
    assert text.endswith(f"; {advice}")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (DeepseekV32Config(), "DeepseekV32ForCausalLM is not supported: an indexer chooses"),
        (
            MptConfig(attn_config={"qk_ln": True}),
            "MptForCausalLM is not supported: transformers takes no notice of attn_config.qk_ln",
        ),
    ],
    ids=["indexer", "unheeded"],
)
def test_an_architecture_that_is_not_supported(
    model: PretrainedConfig, reason: str, tmp_path: Path
) -> None:
    assert _refusal(_config(tmp_path, model)).startswith(reason)


@pytest.mark.parametrize(
    ("positions", "wanted", "reason"),
    [
        (512, 513, "max_total_tokens must be <= 512, the positions that {} has. Given: 513"),
        (1, None, "{} has 1 positions (max_position_embeddings)"),
    ],
)
def test_too_few_positions(positions: int, wanted: int | None, reason: str, tmp_path: Path) -> None:
    model = LlamaConfig(**SMALL | {"max_position_embeddings": positions})
    config = _config(tmp_path, model, max_total_tokens=wanted)
    assert _refusal(config) == reason.format(tmp_path)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 128}, "is for a weight [64, 128], and the model's is [64, 64]"),
        ({"num_hidden_layers": 4}, "the model has no linear layer model.layers.3.self_attn.q_proj"),
    ],
    ids=["shape", "layer"],
)
def test_an_adapter_of_another_model(
    changes: dict[str, int], reason: str, num_ranks: int, tmp_path: Path
) -> None:
    other = build_model(LlamaConfig(**SMALL | {"head_dim": 16} | changes))
    other.save_pretrained(tmp_path / "other")
    adapter = make_adapter(tmp_path / "other", tmp_path / "adapter", 1, **_ADAPTER)
    config = _config(
        tmp_path, LlamaConfig(**SMALL, head_dim=16), adapters=(("mine", str(adapter)),)
    )
    text = _refusal(config, num_ranks)
    assert text.startswith("adapter mine: ")
    assert text.endswith(reason)


def _swap(path: Path) -> None:
    weights = path / WEIGHTS_NAME
    save_file({f"{name}.old": it for name, it in load_file(weights).items()}, weights)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / WEIGHTS_NAME).unlink(), f"has no {WEIGHTS_NAME}"),
        (lambda path: (path / WEIGHTS_NAME).write_bytes(b"x" * 99), f"{WEIGHTS_NAME} is broken"),
        (
            lambda path: (path / CONFIG_NAME).write_text('{"peft_type": "LORA", "r": 5}'),
            "has lora_A [4, 64] and lora_B [64, 4], but its rank is 5",
        ),
        (_swap, "a tensor (model.layers.0.self_attn.q_proj.lora_A.weight.old) is not applied"),
    ],
    ids=["no weights", "broken", "rank", "names"],
)
def test_an_adapter_that_cannot_be_applied(spoil: Any, reason: str, tmp_path: Path) -> None:
    model = LlamaConfig(**SMALL)
    build_model(model).save_pretrained(tmp_path / "other")
    adapter = make_adapter(tmp_path / "other", tmp_path / "adapter", 1, **_ADAPTER)
    spoil(adapter)
    text = _refusal(_config(tmp_path, model, adapters=(("mine", str(adapter)),)))
    assert text.startswith("adapter mine: ")
    assert reason in text


def test_a_part_that_does_not_fit_into_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LlamaConfig(**SMALL, tie_word_embeddings=True)
    parts = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64) // 2 + 128 * 64 // 2
    norms = 7 * 64
    config = _config(tmp_path, model, num_shards=2)
    arguments = (config, model, torch.float16, torch.device("cuda"), Group(0, 2, _gather))
    monkeypatch.setattr(outline, "free_memory", lambda _: 2 * (parts + norms))
    check_outline(*arguments)
    monkeypatch.setattr(outline, "free_memory", lambda _: 2 * (parts + norms) - 1)
    with pytest.raises(ModelLoadError, match=r"each of 2 ranks has 0\.0 GB of its weights, and"):
        check_outline(*arguments)
