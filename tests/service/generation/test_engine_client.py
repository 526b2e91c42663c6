"""The service's end of the engine's socket, with real engine servers over a fake model."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from engine.protocol.request import FinishReason, SamplingParams, StepOutput
from service.errors import ErrorKind, ServiceError
from service.generation.engine_client import EngineClient
from tests.engine.fakes import make_engine, token_ids
from tests.service.fakes import eventually
from tests.service.generation.engines import (
    GREEDY,
    PROMPT,
    SAMPLED,
    SocketProxy,
    StartEngine,
    alone,
    collect,
    connect,
    make_request,
    rest,
    take,
)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_stream_yields_the_outputs_of_the_engine(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine, sampling: SamplingParams
) -> None:
    await connect(client, proxy, start_engine(make_engine()))
    request = make_request(sampling=sampling)
    outputs = await collect(client, request)
    assert token_ids(outputs) == token_ids(alone(request))
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_concurrent_streams_get_their_own_outputs(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    await connect(client, proxy, start_engine(make_engine()))
    requests = [
        make_request(str(seed), SamplingParams(do_sample=True, seed=seed)) for seed in range(8)
    ]
    results = await asyncio.gather(*(collect(client, request) for request in requests))
    for request, outputs in zip(requests, results, strict=True):
        assert token_ids(outputs) == token_ids(alone(request))


def test_ids_are_never_used_twice(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "none")
    assert len({client.new_request_id() for _ in range(100)}) == 100


async def test_a_refusal_of_the_engine_is_an_output_with_an_error(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    await connect(client, proxy, start_engine(make_engine()))
    (output,) = await collect(client, make_request(max_new_tokens=100_000))
    assert output.error


async def test_closing_a_stream_aborts_it(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    gate = threading.Semaphore(3)
    await connect(client, proxy, start_engine(make_engine(gate=gate)))
    outputs = client.generate(make_request(max_new_tokens=40))
    await take(outputs, 2)
    await outputs.aclose()

    def is_over() -> bool:
        gate.release()  # a step at a time, so that the engine may hear of it before the last one
        return client.last_step.stats.num_running == 0 and client.last_step.stats.num_steps > 0

    await eventually(is_over)
    assert client.last_step.stats.num_generated_tokens < 40
    assert client.last_step.stats.num_free_blocks == client.last_step.stats.num_blocks


async def test_requests_are_refused_without_an_engine(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "missing.sock")
    client.start()
    assert not client.is_healthy
    with pytest.raises(ServiceError) as refused:
        await collect(client, make_request())
    assert refused.value.kind is ErrorKind.UNHEALTHY
    await client.close()


async def test_closing_fails_running_requests(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    await connect(client, proxy, start_engine(make_engine(gate=threading.Semaphore(1))))
    outputs = client.generate(make_request())
    await take(outputs, 1)
    await client.close()
    (last,) = await rest(outputs)
    assert last.error == "the server is shutting down"
    assert not client.is_connected


async def test_requests_that_come_after_the_last_words_hear_them_too(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    """They were admitted before, and had to be tokenized."""
    await connect(client, proxy, start_engine(make_engine()))
    client.end_streams("the server is shutting down")
    outputs = await collect(client, make_request())
    assert [output.error for output in outputs] == ["the server is shutting down"]
    assert client.num_active == 0


async def test_listeners_are_called_for_every_step(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    steps: list[StepOutput] = []
    client.on_step.append(steps.append)
    await connect(client, proxy, start_engine(make_engine()))
    await collect(client, make_request())
    assert client.last_step in steps
    assert sum(item.num_prefill_tokens for item in steps) == len(PROMPT)


async def test_a_request_that_waits_too_long_for_its_first_step_is_refused_and_dropped(
    tmp_path: Path, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    gate = threading.Semaphore(0)  # no step is computed
    client = EngineClient(proxy.path, max_waiting_s=0.01)
    await connect(client, proxy, start_engine(make_engine(gate=gate)))
    with pytest.raises(ServiceError, match=r"Model is overloaded: .* waited for 0.01 s") as refused:
        await collect(client, make_request())
    assert refused.value.kind is ErrorKind.OVERLOADED
    gate.release(100)
    await eventually(lambda: client.last_step.stats.num_running == 0)
    await client.close()


async def test_a_request_that_has_begun_may_take_as_long_as_it_does(
    proxy: SocketProxy, start_engine: StartEngine
) -> None:
    gate = threading.Semaphore(1)
    client = EngineClient(proxy.path, max_waiting_s=30)
    await connect(client, proxy, start_engine(make_engine(gate=gate)))
    outputs = client.generate(make_request())
    await take(outputs, 1)
    client._max_waiting_s = 0.0  # what is over by now
    gate.release(100)
    assert (await rest(outputs))[-1].finish_reason is FinishReason.LENGTH
    await client.close()
