"""Adapters of a divided model: the tokens of PEFT's merged models."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Phi3Config, PretrainedConfig, Qwen2Config

from engine.adapters.loader import Outcome
from engine.adapters.peft_directory import WEIGHTS_NAME
from engine.engine import Engine
from engine.protocol.adapters import LoadAdapter
from engine.protocol.config import EngineConfig
from engine.protocol.errors import AdapterError, AdapterFault, ModelLoadError
from engine.protocol.request import Request, SamplingParams, SequenceOutput
from tests.engine.adapters.made import SETTINGS, Made, make, merged_tokens
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import SMALL, build_model, make_prompts
from tests.engine.native import needs_compiler
from tests.engine.shards.team import Team

NUM_TOKENS = 8
PROMPTS = make_prompts()[1:4]
NAMES = ("", *SETTINGS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = build_model(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True))
    return make(model, tmp_path_factory.mktemp("adapters"), SETTINGS)


@pytest.fixture(scope="module")
def expected(made: Made) -> dict[str, list[list[int]]]:
    return {name: merged_tokens(made, name, PROMPTS, NUM_TOKENS) for name in NAMES}


def _config(made: Made, **options: Any) -> EngineConfig:
    return EngineConfig(
        model_id=str(made.model),
        socket_path=made.model / "socket",
        device="cpu",
        block_size=4,
        **{"max_batch_total_tokens": 2048, "max_step_tokens": 32, **options},
    )


def _requests(engine: Engine, *names: str, **options: Any) -> list[Request]:
    """All prompts with each adapter, in the order of the prompts."""
    assert engine.adapters is not None
    digests = {"": ""} | {one.name: one.digest for one in engine.adapters.listed()}
    return [
        Request(
            request_id=f"{name} {index}",
            prompt_token_ids=prompt,
            max_new_tokens=NUM_TOKENS,
            adapter=digests[name],
            **options,
        )
        for index, prompt in enumerate(PROMPTS)
        for name in names
    ]


def _tokens(engine: Engine, *names: str) -> dict[str, list[list[int]]]:
    outputs = run(engine, *_requests(engine, *names))
    return {
        name: [token_ids(outputs[f"{name} {index}"]) for index in range(len(PROMPTS))]
        for name in names
    }


def _load(engine: Engine, name: str, source: str, **options: Any) -> None:
    """Loads an adapter while nothing is computed."""
    wanted = LoadAdapter(name=name, source=source, **options)
    read: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    assert engine.adapters is not None
    engine.adapters.begin(wanted, read.put)
    engine.adapters.finish(wanted, read.get(timeout=60))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=needs_compiler),
        {"enable_native_kernels": False},
        pytest.param({"max_loras": 1}, marks=needs_compiler),
    ],
    ids=str,
)
def test_each_row_has_its_merged_models_tokens(
    made: Made, expected: dict[str, list[list[int]]], options: dict[str, Any], pair: Team
) -> None:
    engine = pair.build(_config(made, adapters=made.pairs, **options))
    assert _tokens(engine, *NAMES) == expected
    assert _tokens(engine, *NAMES) == expected  # now from the prefix cache


@pytest.mark.parametrize(
    "model",
    [
        LlamaConfig(**SMALL | {"num_key_value_heads": 1}, tie_word_embeddings=True),
        Qwen2Config(**SMALL),
        Phi3Config(**SMALL),
    ],
    ids=["a repeated key head", "qwen2", "phi3, whole outputs on each rank"],
)
def test_other_models_have_their_merged_tokens(
    model: PretrainedConfig, pair: Team, tmp_path: Path
) -> None:
    settings = {"r": 5, "lora_alpha": 10, "target_modules": "all-linear"}
    made = make(build_model(model), tmp_path, {"x": settings, "y": settings})
    found = _tokens(pair.build(_config(made, adapters=made.pairs)), "", "x", "y")
    assert found == {name: merged_tokens(made, name, PROMPTS, NUM_TOKENS) for name in found}
    assert found[""] != found["x"] != found["y"]


@needs_compiler
def test_a_text_is_the_same_bit_for_bit_whatever_else_is_in_the_batch(
    made: Made, pair: Team
) -> None:
    engine = pair.build(_config(made, adapters=made.pairs, enable_prefix_caching=False))
    sampling = SamplingParams(do_sample=True, seed=5, temperature=1.5, top_n_tokens=3)
    requests = _requests(engine, *NAMES, sampling=sampling)
    together = run(engine, *requests)
    for request in requests[::2]:
        alone = run(engine, request)[request.request_id]
        assert _chosen(alone) == _chosen(together[request.request_id])


def _chosen(outputs: list[SequenceOutput]) -> list[Any]:
    return [output.token for output in outputs if output.token is not None]


def test_adapters_come_and_go_on_all_ranks(
    made: Made, expected: dict[str, list[list[int]]], pair: Team
) -> None:
    """More than there are slots, one in place of another, and one while its texts still run."""
    engine = pair.build(_config(made, adapter_directory=made.model.parent, max_loras=2))
    assert engine.adapters is not None
    for name in SETTINGS:
        _load(engine, name, name)
    assert _tokens(engine, *NAMES) == expected
    engine.adapters.remove("attention")
    _load(engine, "stable", "patterns", replaces=True)
    found = _tokens(engine, "", "stable", "everything")
    assert found == {
        "": expected[""],
        "stable": expected["patterns"],
        "everything": expected["everything"],
    }
    running = _requests(engine, "everything")[0]
    engine.add(running)
    outputs = [*engine.step().outputs]
    engine.adapters.remove("everything")
    _load(engine, "everything", "attention")
    while engine.has_work:
        outputs += engine.step().outputs
    assert token_ids(outputs) == expected["everything"][0]
    assert _tokens(engine, "everything")["everything"] == expected["attention"]


def _lost(path: Path) -> None:
    (path / WEIGHTS_NAME).unlink()


def _changed(path: Path) -> None:
    shutil.copytree(path.with_name("stable"), path, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("happens", "message"),
    [
        (_lost, f"{WEIGHTS_NAME}.* \\(rank 1\\)"),
        (_changed, "adapter one: its files change while they are read"),
    ],
)
def test_an_adapter_that_one_rank_cannot_read_is_on_none(
    happens: Callable[[Path], None],
    message: str,
    made: Made,
    expected: dict[str, list[list[int]]],
    pair: Team,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("attention", "stable"):
        shutil.copytree(made.adapters[name], tmp_path / name)
    engine = pair.build(_config(made, adapter_directory=tmp_path))
    assert engine.adapters is not None
    others = engine.adapters._others
    read = others.read

    def read_late(wanted: LoadAdapter, directory: Path, digest: str) -> None:
        happens(tmp_path / "attention")
        read(wanted, directory, digest)

    monkeypatch.setattr(others, "read", read_late)
    with pytest.raises(AdapterError, match=message) as caught:
        _load(engine, "one", "attention")
    assert caught.value.fault is AdapterFault.INVALID
    assert engine.adapters.listed() == ()
    monkeypatch.undo()
    _load(engine, "one", "stable")
    assert _tokens(engine, "", "one") == {"": expected[""], "one": expected["stable"]}


def test_an_update_of_another_shape_is_refused_by_that_of_the_whole_layer(
    made: Made, pair: Team, tmp_path: Path
) -> None:
    wide = build_model(LlamaConfig(**SMALL | {"hidden_size": 128, "head_dim": 16}))
    other = make(wide, tmp_path, {"wide": SETTINGS["attention"]})
    with pytest.raises(
        ModelLoadError, match=r"is for a weight \[64, 128\], and the model's is \[64, 64\]"
    ):
        pair.build(_config(made, adapters=other.pairs))
