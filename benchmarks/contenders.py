"""Who takes part in `peers`, started and ready to run loads; who cannot, with the reason."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks import gguf_file, transformers_peers
from benchmarks.ctranslate2_peer import convert, ctranslate2
from benchmarks.llama_build import PeerAbsentError, server_binary
from benchmarks.llama_server import llama_server, llama_stream
from benchmarks.load import Item, Load, uniform
from benchmarks.local_engine import LocalEngine
from benchmarks.local_server import grpc_stream, http_client, rest_stream, server
from benchmarks.openvino_peer import openvino
from benchmarks.peer_process import PeerProcess
from benchmarks.vllm_peer import vllm
from engine.protocol.config import EngineConfig

ALONE, ALONE_INT8 = "engine alone", "engine alone, int8"
OVER_GRPC, OVER_REST = "server, gRPC", "server, REST"
GENERATE, CONTINUOUS = "transformers generate", "transformers continuous batching"
OPENVINO, VLLM, LLAMA = "OpenVINO GenAI", "vLLM", "llama.cpp server"
CTRANSLATE2, CTRANSLATE2_INT8 = "CTranslate2", "CTranslate2, int8"
OURS = (ALONE, ALONE_INT8, OVER_GRPC, OVER_REST)
OPTIONAL = ("server", "int8", "transformers", "OpenVINO", "vLLM", "CTranslate2", "llama.cpp")
CHECKED = 32  # greedy tokens that are compared with those of transformers


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds of a load, and the arrival times of each stream's tokens where they are known."""

    seconds: float
    streams: Sequence[Sequence[float]] = ()

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second of the first stream after its first token."""
        if not self.streams or len(self.streams[0]) < 2:
            return None
        times = self.streams[0]
        return (len(times) - 1) / (times[-1] - times[0])


Arm = Callable[[list[Item]], Awaitable[Outcome]]


@dataclass(slots=True)
class Contenders:
    """The arms, in the order in which they take turns.

    Attributes:
        arms: by name and number of streams.
        absent: who cannot take part, with the reason.
        tokens: what some answer to the item that is checked, greedily.
    """

    arms: dict[str, dict[int, Arm]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @contextmanager
    def may_lack(self, name: str, without: Sequence[str]) -> Iterator[bool]:
        """Within it a peer is started, if that is wanted; what keeps it away is noted."""
        left_out = name.startswith(tuple(without)) or (
            name == CTRANSLATE2_INT8 and "int8" in without
        )
        if left_out:
            self.absent[name] = "switched off"
        try:
            yield not left_out
        except (PeerAbsentError, RuntimeError, TimeoutError) as error:
            self.absent[name] = str(error)


class Start:
    """Starts contenders; they end with the stack.

    Args:
        stack: holds what runs.
        model: the model of transformers.
        path: the directory that it is saved in, or its GGUF file.
        load: what will be asked.
        counts: numbers of streams.
        without: those of `OPTIONAL` that are left out.
    """

    def __init__(
        self,
        stack: AsyncExitStack,
        model: Any,
        path: Path,
        load: Load,
        counts: Sequence[int],
        without: Sequence[str],
    ) -> None:
        self._stack, self._model, self._path = stack, model, path
        self._load, self._counts, self._without = load, counts, without
        self._room = max(load.max_tokens, 48 + CHECKED) + 8  # tokens of a stream
        self._is_file = path.is_file()
        self._checked = uniform(48, CHECKED, model.config.vocab_size).items(1)[0]
        self.found = Contenders()

    async def all(self) -> Contenders:
        """Starts everybody."""
        if "transformers" not in self._without:
            self._add(GENERATE, self._generate)
        self._engines()
        self._openvino()
        self._directories_only(VLLM, self._vllm)
        for name, precision in ((CTRANSLATE2, "float32"), (CTRANSLATE2_INT8, "int8")):
            self._directories_only(name, lambda precision=precision: self._ctranslate2(precision))
        await self._llama()
        await self._server()
        return self.found

    def expected(self) -> list[int]:
        """What transformers answers to the item that is checked."""
        return transformers_peers.generate(self._model, [self._checked])[1][0]

    def _add(self, name: str, arm: Arm) -> None:
        self.found.arms[name] = dict.fromkeys(self._counts, arm)

    def _engines(self) -> None:
        config = EngineConfig(model_id=str(self._path), socket_path=Path("unused.sock"))
        for name, quantize in ((ALONE, None), (ALONE_INT8, "int8")):
            if quantize in self._without:
                continue
            engine = LocalEngine.build(replace(config, quantize=quantize))
            self._add(name, _of_engine(engine))
            if quantize is None:
                answers = engine.run([self._checked]).tokens
                self.found.tokens[name] = next(iter(answers.values()))

    def _openvino(self) -> None:
        with self.found.may_lack(OPENVINO, self._without) as wanted:
            if wanted:
                path = self._path if self._is_file else self._written(gguf_file.F16)
                threads = torch.get_num_threads()
                self._add_process(OPENVINO, openvino(path, "f32", threads, os.environ))

    def _directories_only(
        self, name: str, make: Callable[[], AbstractContextManager[PeerProcess]]
    ) -> None:
        """Adds a peer that reads no GGUF file."""
        with self.found.may_lack(name, self._without) as wanted:
            if wanted and self._is_file:
                raise PeerAbsentError("reads directories of transformers only")
            if wanted:
                self._add_process(name, make())

    def _vllm(self) -> AbstractContextManager[PeerProcess]:
        return vllm(self._path, "float32", torch.get_num_threads(), self._room)

    def _ctranslate2(self, precision: str) -> AbstractContextManager[PeerProcess]:
        return ctranslate2(convert(self._path), precision, torch.get_num_threads())

    def _add_process(self, name: str, making: AbstractContextManager[PeerProcess]) -> None:
        process = self._stack.enter_context(making)

        async def arm(items: list[Item]) -> Outcome:
            run = await asyncio.to_thread(process.run, items)
            return Outcome(run.seconds, run.arrivals)

        self._add(name, arm)

    async def _llama(self) -> None:
        """A server for each number of streams."""
        with self.found.may_lack(LLAMA, self._without) as wanted:
            if not wanted:
                return
            binary, threads = server_binary(), torch.get_num_threads()
            path = self._path if self._is_file else self._written(gguf_file.F32)
            arms = {}
            for count in self._counts:
                url = await self._stack.enter_async_context(
                    llama_server(binary, path, count, self._room, threads)
                )
                client = await self._stack.enter_async_context(http_client(url))
                arms[count] = _of_streams(lambda item, client=client: _llama(client, item))
            self.found.arms[LLAMA] = arms
            self.found.tokens[LLAMA] = (await llama_stream(client, self._checked)).tokens

    async def _server(self) -> None:
        if self._is_file:
            self.found.absent["server"] = "its prompts are words of the random model"
        elif "server" not in self._without:
            url, address = await self._stack.enter_async_context(server(self._path))
            channel = grpc.aio.insecure_channel(address)
            await self._stack.enter_async_context(channel)
            client = await self._stack.enter_async_context(http_client(url))
            self._add(OVER_GRPC, _of_streams(lambda item: grpc_stream(channel, item)))
            self._add(OVER_REST, _of_streams(lambda item: rest_stream(client, item)))

    def _written(self, form: gguf_file.Format) -> Path:
        path = self._path / f"{form.file.name}.gguf"
        gguf_file.write(self._model, path, form)
        return path

    async def _generate(self, items: list[Item]) -> Outcome:
        return Outcome(transformers_peers.generate(self._model, items)[0])


async def continuous(model: Any, load: Load, items: list[Item]) -> Outcome:
    """Runs a load on continuous batching of transformers, which warms up first."""
    limits = (load.prompt_tokens[1], load.new_tokens[1], len(items))
    with transformers_peers.continuous(model, *limits) as manager:
        transformers_peers.run_continuous(manager, uniform(8, 2, model.config.vocab_size).items(1))
        seconds, _ = transformers_peers.run_continuous(manager, items)
    return Outcome(seconds)


async def _llama(client: Any, item: Item) -> list[float]:
    return (await llama_stream(client, item)).arrivals


def _of_engine(engine: LocalEngine) -> Arm:
    async def arm(items: list[Item]) -> Outcome:
        run = engine.run(items)
        streams = [[at - run.started for at in times] for times in run.arrivals.values()]
        return Outcome(run.seconds, streams)

    return arm


def _of_streams(stream: Callable[[Item], Awaitable[list[float]]]) -> Arm:
    """Asks a server for all items at once; each stream must have all its tokens."""

    async def arm(items: list[Item]) -> Outcome:
        started = time.perf_counter()
        streams = await asyncio.gather(*(stream(item) for item in items))
        seconds = time.perf_counter() - started
        for item, arrivals in zip(items, streams, strict=True):
            if len(arrivals) != item.new_tokens:
                raise RuntimeError(f"a stream gave {len(arrivals)} of {item.new_tokens} tokens")
        return Outcome(seconds, [[at - started for at in times] for times in streams])

    return arm
