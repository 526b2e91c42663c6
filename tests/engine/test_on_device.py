"""The engine as it is built for a server, on the device of the tests (`pytest --device cuda`).

On a GPU this runs what no other test does: loading onto the device, the start-up's checks, sizing
the cache, recording steps, and requests whose steps are replayed and run ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.build import build_engine
from engine.engine import Engine
from engine.protocol.config import EngineConfig, EngineInfo
from engine.protocol.request import Request
from tests.engine.fakes import make_request, run, token_ids
from tests.engine.model.architectures import ARCHITECTURES, build_model, generate, make_prompts
from tests.engine.on_device import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["llama", "qwen3", "gemma3"]


@dataclass(frozen=True)
class Built:
    """An engine on the device, and the checkpoint it was loaded from."""

    name: str
    engine: Engine
    info: EngineInfo


@pytest.fixture(scope="module", params=NAMES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    path = tmp_path_factory.mktemp(request.param)
    build_model(ARCHITECTURES[request.param]()).save_pretrained(path)
    return Built(request.param, *made(path))


def made(path: Path, dtype: str = "float32") -> tuple[Engine, EngineInfo]:
    """An engine as for a server, with a small cache."""
    return build_engine(
        EngineConfig(
            model_id=str(path),
            socket_path=path / "socket",
            device=DEVICE.type,
            dtype=dtype,
            max_total_tokens=256,
            max_batch_total_tokens=4096,
            max_num_seqs=48,
            max_step_tokens=128,
            num_threads=1,
        )
    )


def asked(**sampling: object) -> list[Request]:
    return [
        make_request(str(index), tuple(prompt), max_new_tokens=10, sampling=sampling)
        for index, prompt in enumerate(make_prompts())
    ]


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    outputs = run(engine, *requests)
    return [token_ids(outputs[request.request_id]) for request in requests]


def test_it_runs_on_the_device_and_on_our_kernels(built: Built) -> None:
    assert built.info.device == DEVICE.type
    wanted = {"cuda": "Triton kernels", "cpu": "native CPU kernels"}[DEVICE.type]
    assert built.info.attention == wanted


def test_greedy_tokens_are_those_of_transformers(built: Built) -> None:
    assert answers(built.engine, asked()) == generate(built.name)


def test_most_steps_that_only_decode_are_replayed(built: Built) -> None:
    answers(built.engine, asked())  # on a CPU this records them
    before = built.engine.stats()
    answers(built.engine, asked())
    stats = built.engine.stats()
    num_replayed = stats.num_replayed_steps - before.num_replayed_steps
    assert num_replayed >= 0.6 * (stats.num_steps - before.num_steps)


def test_a_text_is_the_same_alone_and_with_others(built: Built) -> None:
    together = answers(built.engine, asked(do_sample=True, seed=5, top_p=0.9))
    alone = [answers(built.engine, [one])[0] for one in asked(do_sample=True, seed=5, top_p=0.9)]
    assert together == alone


def test_penalties_and_likeliest_tokens_beside_plain_requests(built: Built) -> None:
    requests = [
        make_request("plain", (5, 6, 7), max_new_tokens=8),
        make_request("penalised", (5, 6, 7), sampling={"repetition_penalty": 1.5}),
        make_request("frequent", (5, 6, 7), sampling={"frequency_penalty": 0.9}),
        make_request("top", (5, 6, 7), sampling={"top_n_tokens": 3}),
        make_request("scored", (5, 6, 7), prompt_logprobs=True),
    ]
    outputs = run(built.engine, *requests)
    for request in requests:
        (alone,) = run(built.engine, request).values()
        assert token_ids(outputs[request.request_id]) == token_ids(alone)
    tops = [output.token.top for output in outputs["top"] if output.token is not None]
    assert all(len(top) >= 3 for top in tops)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU computes in float32 only")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_give_log_probabilities_near_those_of_float32(
    dtype: str, built: Built, tmp_path: Path
) -> None:
    build_model(ARCHITECTURES[built.name]()).save_pretrained(tmp_path)
    engine, info = made(tmp_path, dtype)
    assert info.attention == "Triton kernels"
    request = make_request(prompt=tuple(make_prompts()[0]), prompt_logprobs=True)
    exact, rounded = (logprobs(one, request) for one in (built.engine, engine))
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(exact), atol=0.3, rtol=0.05)


def logprobs(engine: Engine, request: Request) -> list[float]:
    outputs = run(engine, request)[request.request_id]
    return [value for one in outputs for value in one.prompt_logprobs if value is not None]
