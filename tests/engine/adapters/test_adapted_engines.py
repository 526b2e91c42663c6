"""Rows of one batch have the tokens of the models that PEFT merges their adapters into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GPT2Config, LlamaConfig, Phi3Config, Qwen3MoeConfig

from engine.adapters.peft_directory import WEIGHTS_NAME, read_adapter
from engine.adapters.segmented_updates import Capacity
from engine.batch.recorded_rows import TableWidths
from engine.build import build_engine
from engine.computation import adapters, computation
from engine.engine import Engine
from engine.model import prepare
from engine.model.loaded import LoadedModel
from engine.model.passes import merge_projections
from engine.protocol.config import EngineConfig, EngineInfo
from engine.protocol.request import Request, SequenceOutput
from engine.replay.cpu_recorder import CpuGraph
from engine.replay.cuda_graphs import CudaGraphs, Replay
from engine.replay.shapes import decode_shapes
from tests.engine.adapters.made import SETTINGS, Made, make, merged_tokens
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import (
    ARCHITECTURES,
    PECULIAR,
    SMALL,
    build_model,
    make_prompts,
)
from tests.engine.native import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("one_thread")]

NUM_TOKENS = 12
PROMPTS = make_prompts()[:4]  # of 1 to 50 tokens; some have a common beginning
NAMES = ("", *SETTINGS)
DIGESTS = {"": ""}  # of the adapters, by which requests choose them
_TIED = LlamaConfig(**SMALL, tie_word_embeddings=True)
_MIXTURE = Qwen3MoeConfig(
    **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = build_model(ARCHITECTURES["llama"]())
    return make(model, tmp_path_factory.mktemp("adapters"), SETTINGS)


@pytest.fixture(scope="module")
def expected(made: Made) -> dict[str, list[list[int]]]:
    tokens = {name: merged_tokens(made, name, PROMPTS, NUM_TOKENS) for name in NAMES}
    assert len({str(lists) for lists in tokens.values()}) == len(NAMES), "adapters differ"
    return tokens


def engine_for(made: Made, **options: Any) -> tuple[Engine, EngineInfo]:
    for name, path in made.pairs:
        DIGESTS[name] = read_adapter(name, path).digest.hex()
    return build_engine(
        EngineConfig(
            model_id=str(made.model),
            socket_path=made.model / "socket",
            device="cpu",
            num_threads=1,
            adapters=made.pairs,
            block_size=4,
            **{"max_batch_total_tokens": 4096, **options},
        )
    )


def request(adapter: str, index: int, **options: Any) -> Request:
    """With an adapter of the engine that was made last."""
    wanted: dict[str, Any] = {
        "request_id": f"{adapter} {index}",
        "prompt_token_ids": PROMPTS[index],
        "max_new_tokens": NUM_TOKENS,
        "adapter": DIGESTS.get(adapter, "00" * 32),
    }
    return Request(**wanted | options)


def tokens_of_all(engine: Engine, names: tuple[str, ...]) -> dict[str, list[list[int]]]:
    """What all prompts get with each adapter, all in the same batch."""
    requests = [request(name, index) for index in range(len(PROMPTS)) for name in names]
    outputs = run(engine, *requests)
    return {
        name: [token_ids(outputs[f"{name} {index}"]) for index in range(len(PROMPTS))]
        for name in names
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"enable_native_kernels": False},
        {"max_step_tokens": 16},  # prompts in chunks
        {"max_batch_total_tokens": 512 + 64, "max_num_seqs": 40, "max_total_tokens": 100},
        {"speculate": 3},
        {"run_ahead": True},
        {"graph_sizes": (0,)},
        {"max_loras": 1},
        {"max_loras": 3, "max_num_seqs": 5},
    ],
    ids=str,
)
def test_each_row_has_its_merged_models_tokens(
    made: Made, expected: dict[str, list[list[int]]], options: dict[str, Any]
) -> None:
    engine, _ = engine_for(made, **options)
    assert tokens_of_all(engine, NAMES) == expected
    assert tokens_of_all(engine, NAMES) == expected  # now from recordings and the prefix cache
    stats = engine.stats()
    assert (stats.num_cached_tokens > 0) == options.get("enable_prefix_caching", True)


def test_merged_projections_have_the_updates_of_their_parts(
    made: Made, expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where query, key and value are one product."""
    tables = prepare.use_rotary_tables

    def merge_before(loaded: LoadedModel, num_positions: int) -> None:
        merge_projections(loaded)
        tables(loaded, num_positions)

    monkeypatch.setattr(prepare, "use_rotary_tables", merge_before)
    engine, _ = engine_for(made, graph_sizes=(0,))
    assert tokens_of_all(engine, NAMES) == expected


def test_a_recorded_step_is_replayed_with_any_adapter(
    made: Made, expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: list[int] = []
    replay = CpuGraph.replay
    monkeypatch.setattr(CpuGraph, "replay", lambda graph: replayed.append(1) or replay(graph))
    engine, _ = engine_for(made, enable_prefix_caching=False)
    for name in (*NAMES, *reversed(NAMES)):  # of the same shape, one after the other
        before = len(replayed)
        assert token_ids(run(engine, request(name, 1))[f"{name} 1"]) == expected[name][1]
    assert len(replayed) - before == NUM_TOKENS - 1, "all but the prompt"
    pairs = [(first, second) for first in NAMES for second in NAMES if first != second]
    for first, second in pairs:
        outputs = run(engine, request(first, 1), request(second, 1))
        for name in (first, second):
            assert token_ids(outputs[f"{name} 1"]) == expected[name][1]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_steps_as_a_gpu_records_them_serve_any_mix_of_adapters(
    made: Made,
    expected: dict[str, list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The Triton kernel in its interpreter; a replay is a call with the same addresses."""
    pytest.importorskip("triton")
    replays: list[str] = []
    graphs: list[CudaGraphs] = []

    def recorder(run: Callable[[], object]) -> Replay:
        run()
        return lambda: (replays.append("one"), run())

    def recorded(
        config: EngineConfig, runner: Any, forward: Any, bounds: Any, size: int, room: Capacity
    ) -> CudaGraphs:
        widths = TableWidths.of(bounds.max_total_tokens, config.block_size, bounds.form)
        shapes = decode_shapes((3,))
        options = {"vocab_size": size, "device": runner.device, "widths": widths}
        graphs.append(CudaGraphs(forward, shapes, adapter_rank=lambda: room.rank, **options))
        graphs[0].record(recorder)
        return graphs[0]

    monkeypatch.setattr(adapters, "_has_segmented_updates", lambda *_: True)
    monkeypatch.setattr(computation, "recorded_steps", recorded)
    some = Made(made.model, {name: made.adapters[name] for name in ("everything", "patterns")})
    options = {"max_loras": 2, "max_num_seqs": 3, "max_step_tokens": 16}  # so that it takes seconds
    engine, _ = engine_for(
        some, enable_native_kernels=False, enable_prefix_caching=False, **options
    )
    assert len(graphs[0]._recorded) == 2, "with and without adapters"

    def replayed(*names: str) -> int:
        """How many steps of these adapters' texts are replayed; they are the right ones."""
        replays.clear()
        outputs = run(engine, *[request(name, 0, max_new_tokens=3) for name in names])
        for name in names:
            assert token_ids(outputs[f"{name} 0"]) == expected[name][0][:3]
        return len(replays)

    for names in (("everything",), ("", "everything", "patterns"), ("",)):
        assert replayed(*names) == 2, "all but the prompt"
    assert engine.adapters is not None
    assert engine.adapters.layers.capacity is not None
    engine.adapters.layers.capacity.grow(100)  # as an adapter of such a rank does
    assert replayed("") == 2
    assert replayed("patterns") == 0, "it is recorded with less room"
    assert "rank 100" in caplog.text


def test_preempted_rows_keep_their_adapters(
    made: Made, expected: dict[str, list[list[int]]]
) -> None:
    engine, _ = engine_for(made, max_batch_total_tokens=160, max_total_tokens=100)
    assert tokens_of_all(engine, NAMES) == expected
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (_TIED, SETTINGS["everything"]),
        (GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
         {"r": 5, "lora_alpha": 10, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        (Phi3Config(**SMALL), {"r": 5, "lora_alpha": 10, "target_modules": "all-linear"}),
        (Gemma2Config(**SMALL, head_dim=16), SETTINGS["patterns"]),
        (PECULIAR["bloom"](), {"r": 5, "lora_alpha": 10, "target_modules": "all-linear"}),
        (PECULIAR["falcon, biased"](), {"r": 5, "lora_alpha": 10, "target_modules": "all-linear"}),
        (_MIXTURE, SETTINGS["attention"]),
    ],
    ids=["tied llama", "gpt2", "phi3", "gemma2", "bloom", "falcon", "qwen3 moe"],
)  # fmt: skip
def test_other_models_have_their_merged_tokens(
    config: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    made = make(build_model(config), tmp_path, {"x": settings, "y": settings})
    engine, _ = engine_for(made)
    found = tokens_of_all(engine, ("", "x", "y"))
    wanted = {name: merged_tokens(made, name, PROMPTS, NUM_TOKENS) for name in found}
    assert found == wanted
    assert found[""] != found["x"] != found["y"]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_base_model_may_be_quantised(made: Made, quantize: str) -> None:
    """Its rows are those without adapters, bit for bit, and an adapter's rows do not depend on it.

    No merged model has the same weights: what is rounded there is the sum.
    """
    plain, _ = engine_for(Made(made.model, {}), quantize=quantize)
    engine, _ = engine_for(made, quantize=quantize)
    mixed = tokens_of_all(engine, NAMES)
    assert mixed[""] == tokens_of_all(plain, ("",))[""]
    for name in SETTINGS:
        assert mixed[name] != mixed[""]
        assert tokens_of_all(engine_for(made, quantize=quantize)[0], (name,))[name] == mixed[name]


def test_the_experts_of_the_base_model_may_be_quantised(tmp_path: Path) -> None:
    made = make(build_model(_MIXTURE), tmp_path, {"x": SETTINGS["attention"]})
    engine, _ = engine_for(made, quantize="int8")
    plain, _ = engine_for(Made(made.model, {}), quantize="int8")
    found = tokens_of_all(engine, ("", "x"))
    assert found[""] == tokens_of_all(plain, ("",))[""]
    assert found[""] != found["x"]


def test_rows_of_the_base_model_are_the_same_bit_for_bit(made: Made) -> None:
    alone, _ = engine_for(Made(made.model, {}))
    mixed, _ = engine_for(made)
    wanted = run(alone, request("", 3))[" 3"]
    assert run(mixed, request("everything", 2), request("", 3))[" 3"] == wanted


def test_adapters_are_rounded_if_asked(made: Made, tmp_path: Path) -> None:
    """They answer as files do that were rounded before, and not as the files that are there."""
    name = "attention"  # whose scale is a power of two
    given, rounded = made.adapters[name], tmp_path / name
    shutil.copytree(given, rounded)
    tensors = load_file(given / WEIGHTS_NAME)
    save_file({key: one.bfloat16() for key, one in tensors.items()}, rounded / WEIGHTS_NAME)

    def outputs(path: Path, lora_dtype: str | None) -> list[SequenceOutput]:
        engine, _ = engine_for(Made(made.model, {name: path}), lora_dtype=lora_dtype)
        return run(engine, request(name, 1))[f"{name} 1"]

    wanted = outputs(rounded, None)
    assert outputs(given, "bfloat16") == wanted
    assert outputs(given, None) != wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_text_goes_on_with_its_adapter(
    made: Made, expected: dict[str, list[list[int]]], name: str
) -> None:
    engine, _ = engine_for(made)
    resumed = request(name, 1, resumed_token_ids=tuple(expected[name][1][:5]))
    outputs = run(engine, resumed)[resumed.request_id]
    assert token_ids(outputs) == expected[name][1][5:]


def test_an_adapter_that_is_not_there_fails_its_request_alone(
    made: Made, expected: dict[str, list[list[int]]]
) -> None:
    engine, info = engine_for(made)
    assert [one.name for one in info.adapters] == [*SETTINGS]
    assert [one.rank for one in info.adapters] == [4, 3, 8, 7]
    outputs = run(engine, request("nobody", 0), request("stable", 0))
    assert outputs["nobody 0"][0].error == "the adapter is not loaded any more"
    assert token_ids(outputs["stable 0"]) == expected["stable"][0]
