"""Logits, keys and values are the same, bit for bit, however a text is divided among steps."""

from __future__ import annotations

import dataclasses
import logging
import random
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.architectures import ARCHITECTURES as TRIED
from engine.attention.kv_cache import KVCache
from engine.attention.paged import ReferenceAttention
from engine.batch.model_input import AttentionInput, ModelInput, SequenceState, StateRows
from engine.kernels import cpu as cpu_kernels
from engine.model import quantization
from engine.model.loaded import LoadedModel
from engine.model.model_runner import ModelRunner
from engine.model.prepare import PreparedModel, prepare
from engine.model.self_check import attach_paged_attention, recomputes_exactly
from engine.protocol.config import EngineConfig
from tests.engine.model.architectures import ARCHITECTURES, CPU, build_model
from tests.engine.model.test_experts import CONFIGS
from tests.engine.native import needs_compiler, threads
from tests.on_demand import on_demand

BLOCK_SIZE = 16
NUM_TOKENS = 600  # more than a split of attention
MAX_BLOCKS = 40  # of a sequence
COMPANY = 3  # sequences that may be in the same step
QUANTIZED = [("llama", "int8"), ("llama", "int4"), ("gemma2", "int8"), ("phi", "int4")]
MIXTURES = {name: CONFIGS[name] for name in ("qwen3_moe", "mixtral", "gpt_oss")}
MODELS = [
    *((name, None) for name in ARCHITECTURES | MIXTURES),
    *QUANTIZED,
    *((name, "int8") for name in MIXTURES),
]
REFUSED = {"DeepSeek V3.2", "DeepSeek V4", "GLM 5", "RecurrentGemma", "RWKV", "DiffLlama", "Doge"}
REFUSED |= {"PaliGemma"}
# Of what they do beside attention and experts: gates of shared experts, groups of experts, products
# with latents, experts whose input is weighed, gates of layers.
OTHERS = [one.name for one in TRIED if one.name not in REFUSED]
SOME_OTHERS = {
    *("Qwen 2 MoE", "MiniMax M2", "DeepSeek V2", "DeepSeek V3, R1", "Llama 4", "Gemma 4", "JetMoE"),
    *("Qwen 3 Next", "MiniMax Text 01", "Nemotron H", "Jamba", "MiMo V2 Flash"),
}
TO_QUANTIZE = {
    *SOME_OTHERS,
    *("GLM 4.5, 4.6", "Phi 3.5 MoE", "Mamba", "Mamba 2", "Granite 4 hybrid", "LFM 2"),
    *("Kimi Linear", "Falcon H1"),
}
SPOILT = {("Gemma 4", "int4"), ("Mamba", "int4")}  # with random weights, so that it is refused
OTHERS_QUANTIZED = sorted({(n, q) for n in TO_QUANTIZE for q in ("int8", "int4")} - SPOILT)
SHORT = 100  # tokens
SAMPLE = [MODELS[0], ("gemma3", None), *QUANTIZED, ("qwen3_moe", None)]
Part = tuple[int, list[int], int]  # a sequence's number, tokens, and the position of the first


def build(name: str) -> PreTrainedModel:
    if name in OTHERS:
        return next(one for one in TRIED if one.name == name).build()
    model_config = (ARCHITECTURES | MIXTURES)[name]()
    model_config.max_position_embeddings = NUM_TOKENS
    return build_model(model_config, 1.5)


def load(config: EngineConfig, model: PreTrainedModel) -> LoadedModel:
    loaded = attach_paged_attention(model, CPU, torch.float32)
    scheme = quantization.choose(config, model.config, CPU, torch.float32)
    return dataclasses.replace(loaded, scheme=scheme)


@cache
def prepared(name: str, quantize: str | None) -> PreparedModel:
    """A small model after all passes."""
    assert cpu_kernels.load() is not None
    config = EngineConfig(
        model_id=name, socket_path=Path("unused"), device="cpu", quantize=quantize
    )
    return prepare(config, lambda config: load(config, build(name)))


def step(parts: list[Part]) -> ModelInput:
    """A step of sequences in blocks of their own; all logits of the first are wanted."""
    positions = [range(first, first + len(ids)) for _, ids, first in parts]
    starts = torch.tensor([0, *map(len, positions)]).cumsum(0).int()
    tables = [range(number * MAX_BLOCKS, (number + 1) * MAX_BLOCKS) for number, _, _ in parts]
    slots = [
        number * MAX_BLOCKS * BLOCK_SIZE + position
        for (number, _, _), span in zip(parts, positions, strict=True)
        for position in span
    ]
    return ModelInput(
        input_ids=torch.tensor([token for _, ids, _ in parts for token in ids]),
        positions=torch.tensor([position for span in positions for position in span]),
        attention=AttentionInput(
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(tables).int(),
            query_start_loc=starts,
            context_lens=torch.tensor([span.stop for span in positions]).int(),
        ),
        logits_rows=torch.arange(len(parts[0][1])),
        sampled={},
        prompt_rows=[],
        states=states(parts),
    )


def states(parts: list[Part]) -> StateRows:
    """The sequences of a step, whose states are in the slots of their numbers."""
    if all(len(ids) == 1 and first > 0 for _, ids, first in parts):
        return StateRows.decode(torch.tensor([number for number, _, _ in parts]))
    starts = [0, *accumulate(len(ids) for _, ids, _ in parts)]
    return StateRows(starts, [SequenceState(number, first == 0) for number, _, first in parts], CPU)


def text() -> list[int]:
    return random.Random(1).choices(range(3, 128), k=NUM_TOKENS)


def compute(model: PreparedModel, ends: list[int], seed: int = 0, company: int = 0) -> Tensor:
    """Logits, keys and values of the tokens, and states after them, as one vector.

    They are computed in steps with these ends.
    """
    cache_ = KVCache(
        model.loaded.layers, (1 + COMPANY) * MAX_BLOCKS, BLOCK_SIZE, model.cache_dtype, CPU
    )
    pool = model.loaded.state_pool(1 + COMPANY)
    runner, rng = ModelRunner(model.loaded, cache_, model.backend, pool), random.Random(seed)
    logits, lengths = [], [0] * COMPANY
    for low, high in pairwise([0, *ends]):
        others = company_of(rng, lengths[: rng.randint(0, company)])
        for number, ids, first in others:
            lengths[number - 1] = first + len(ids)
        logits.append(runner.forward(step([(0, text()[low:high], low), *others])).clone())
    found = [*logits]
    for pair in cache_.layers.values():
        found += [rows[:MAX_BLOCKS].flatten(0, 1)[: ends[-1]] for rows in pair]
    for layer in model.loaded.recurrence.states if model.loaded.recurrence else ():
        assert pool is not None
        kept = pool.at(layer, 0)
        found += [*kept.conv.values(), *kept.recurrent.values()]
    return torch.cat([part.flatten() for part in found])


def company_of(rng: random.Random, lengths: list[int]) -> list[Part]:
    """Tokens of sequences that have so many: a next one, or those of another text."""
    parts = []
    for number, length in enumerate(lengths, start=1):
        goes_on = length > 0 and rng.random() < 0.5
        ids = rng.choices(range(3, 128), k=1 if goes_on else rng.randrange(1, 60))
        parts.append((number, ids, length if goes_on else 0))
    return parts


def random_ends(seed: int, num_tokens: int = NUM_TOKENS) -> list[int]:
    """Steps of one token, of few, as with drafts, and chunks of prompts of any size."""
    rng, ends = random.Random(seed), [0]
    while ends[-1] < num_tokens:
        size = rng.choice([1, 1, 1, 2, 3, 5, rng.randrange(1, 30), rng.randrange(1, 300)])
        ends.append(min(ends[-1] + size, num_tokens))
    return ends[1:]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "quantize"),
    [pytest.param(*m, marks=() if m in SAMPLE else on_demand) for m in MODELS],
)
def test_every_division_gives_the_same_bits(name: str, quantize: str | None) -> None:
    check_divisions(prepared(name, quantize), NUM_TOKENS)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        *(pytest.param(n, None, marks=() if n in SOME_OTHERS else on_demand) for n in OTHERS),
        *(pytest.param(*one, marks=on_demand) for one in OTHERS_QUANTIZED),
    ],
)
def test_every_kind_gives_the_same_bits_for_short_texts(name: str, quantize: str | None) -> None:
    check_divisions(prepared(name, quantize), SHORT)


def check_divisions(model: PreparedModel, num_tokens: int) -> None:
    """That all divisions of a text among steps, with any company, give its tokens the same bits."""
    with threads(1):
        whole = compute(model, [num_tokens])
        assert torch.equal(compute(model, [*range(1, num_tokens + 1)]), whole)
    for seed in range(3):
        with threads(1 + seed):
            ends = random_ends(seed, num_tokens)
            assert torch.equal(compute(model, ends, seed, COMPANY), whole)


class Uneven(ReferenceAttention):
    """Attention whose last bits depend on the number of tokens in a step."""

    def paged_attention(self, query: Tensor, *args: Any, **options: Any) -> Tensor:
        return super().paged_attention(query, *args, **options) * (1 + len(query) * 1e-6)


@needs_compiler
def test_a_backend_that_computes_steps_differently_is_found_out() -> None:
    model = prepared("llama", None)
    for backend, is_exact in ((model.backend, True), (Uneven(), False)):
        found = recomputes_exactly(model.loaded, backend, BLOCK_SIZE, torch.float32)
        assert found is is_exact


@needs_compiler
@pytest.mark.parametrize(
    ("is_exact", "message"), [(True, "the same bit for bit"), (False, "differ by rounding")]
)
def test_start_up_says_whether_texts_are_recomputed_exactly(
    is_exact: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("engine.model.prepare.recomputes_exactly", lambda *_: is_exact)
    with caplog.at_level(logging.INFO), threads(1):
        prepared.__wrapped__("llama", None)
    assert message in caplog.text
