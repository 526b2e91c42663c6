"""Parts of benchmarks whose errors would not show in the output."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gguf_file
from benchmarks.load import Load, generated, uniform
from benchmarks.local_engine import gaps
from benchmarks.model_costs import costs
from benchmarks.random_model import build, llama_8b, llama_125m, qwen3_06b, shrunk
from benchmarks.report import Target, percentile, table
from benchmarks.timeline import covered


def test_items_repeat_their_lengths_but_not_their_prompts() -> None:
    load = Load((10, 50), (2, 9), vocab_size=100)
    first, second = load.items(8), load.items(8)
    assert [len(item.prompt) for item in first] == [len(item.prompt) for item in second]
    assert [item.new_tokens for item in first] == [item.new_tokens for item in second]
    assert {tuple(item.prompt[:8]) for item in first}.isdisjoint(
        tuple(item.prompt[:8]) for item in second
    )


def test_two_loads_share_no_prompt() -> None:
    first, second = uniform(40, 2), uniform(24, 2)
    assert first.items(1)[0].prompt[:8] != second.items(1)[0].prompt[:8]


def test_lengths_cover_their_range() -> None:
    items = Load((10, 50), (2, 9)).items(5)
    assert sorted(len(item.prompt) for item in items) == [10, 20, 30, 40, 50]
    assert generated(items) == 2 + 3 + 5 + 7 + 9
    assert len(Load((10, 50), (2, 9)).items(1)[0].prompt) == 30
    assert {len(item.prompt) for item in uniform(7, 3).items(4)} == {7}


@pytest.mark.parametrize("config", [llama_125m(), qwen3_06b()], ids=["untied", "tied"])
def test_costs_equal_the_sizes_of_the_weights(config: object) -> None:
    small = shrunk(config)
    model = build(small, torch.device("cpu"), torch.float32)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    layers += model.model.norm.weight.numel()
    head = model.lm_head.weight.numel()
    found = costs(small, torch.bfloat16)
    assert found.weight_bytes == 2 * (layers + head)
    assert found.flops_per_token == 2 * layers
    assert found.head_flops == 2 * head


def test_costs_of_the_8b_shape_are_correct() -> None:
    found = costs(llama_8b(), torch.bfloat16)
    assert found.weight_bytes == pytest.approx(15.0e9, rel=0.01)
    assert found.kv_bytes_per_token == 128 * 1024
    assert found.prefill_flops([1000]) == pytest.approx(14.5e12, rel=0.05)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_8b())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.03e9, rel=0.001)


def test_overlap_of_two_kernels_counts_once() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert covered([]) == 0


def test_target_has_a_verdict() -> None:
    assert Target("", 0.9, 0.85).verdict == "met"
    assert Target("", 0.04, 0.03, at_least=False).verdict == "missed"
    assert Target("", None, 1.0).verdict == "not measured"
    assert Target("a", 0.9, 0.85, percent=True).cells() == ["a", "90.0%", ">= 85.0%", "met"]


def test_tables_are_aligned() -> None:
    assert table(["a", "b"], [["long", "1"], ["x", "22"]]) == "a       b\nlong    1\nx      22"


def test_gaps_are_measured_within_a_stream() -> None:
    assert gaps([[1.0, 3.0, 4.0], [2.0]]) == [2.0, 1.0]
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


def test_gguf_contains_every_weight(tmp_path: Path) -> None:
    model = build(shrunk(llama_125m()), torch.device("cpu"), torch.float32)
    gguf_file.write(model, tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    magic, version, num_tensors, _ = struct.unpack_from("<4sIQQ", data)
    assert (magic, version, num_tensors) == (b"GGUF", 3, len(model.state_dict()))
    last = model.state_dict()["lm_head.weight"].numpy().tobytes()
    assert data.endswith(last + bytes(-len(last) % 32))
    assert data.index(b"blk.1.attn_q.weight") < data.index(b"output_norm.weight")


def test_gguf_interleaves_the_halves_of_each_head() -> None:
    rows = torch.arange(16.0).unsqueeze(1)  # two heads of 8
    assert gguf_file._interleaved(rows, 2).flatten().tolist() == [
        *(0, 4, 1, 5, 2, 6, 3, 7),
        *(8, 12, 9, 13, 10, 14, 11, 15),
    ]
