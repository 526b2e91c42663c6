"""Several engines with the same model, which are one engine to the rest of a service.

Each request goes to one of them. A request whose engine dies or does not get on goes on at once in
another one, with the tokens that it has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from engine.protocol.adapters import AdapterInfo, LoadAdapter
from engine.protocol.config import EngineInfo
from engine.protocol.errors import AdapterError, AdapterFault
from engine.protocol.request import Request, SequenceOutput, StepOutput

from ..call_record import CallRecord
from ..errors import ServiceError, unhealthy
from .engine_choice import EngineChoice
from .engine_client import EngineClient
from .engine_stream import Stream, open_stream

logger = logging.getLogger(__name__)

_LOOK_S = 0.1  # between two looks for engines that do not get on
_MAX_STALLS = 3  # engines that a request is taken away from: it may be why they do not get on
# What has to be equal, so that a text goes on in another engine with the same tokens.
_SAME = ("model_id", "model_sha", "dtype", "device", "vocab_size", "block_size", "attention")


@dataclass(slots=True, eq=False)
class _Replica:
    """One engine, and how many requests of other services it has."""

    number: int
    client: EngineClient
    num_foreign: int = 0
    fitting: dict[str, bool] = field(default_factory=dict)  # by instance

    @property
    def load(self) -> int:
        """Requests that it has, running or waiting."""
        return self.client.num_active + self.num_foreign

    def step(self, output: StepOutput) -> None:
        """The engine told its figures."""
        told = output.stats.num_running + output.stats.num_waiting
        self.num_foreign = max(0, told - self.client.num_active)

    def suits(self, stream: Stream) -> bool:
        """Whether it can compute a request as far as is known: its adapter, and its length."""
        request, info = stream.request, self.client.info
        num_tokens = len(request.prompt_token_ids) + request.max_new_tokens
        if info is None or num_tokens > info.max_total_tokens:
            return False
        adapters = self.client.adapters.values()
        return not request.adapter or any(one.digest == request.adapter for one in adapters)


class EnginePool:
    """The connections to several engines.

    Args:
        clients: the connections, in the engines' order.
        prefix_affinity: whether requests go to an engine that knows their beginning.
        max_waiting_s: how long a request may wait for its first step; None sets no bound.
    """

    def __init__(
        self,
        clients: Sequence[EngineClient],
        *,
        prefix_affinity: bool = True,
        max_waiting_s: float | None = None,
    ) -> None:
        self._replicas = [_Replica(number, client) for number, client in enumerate(clients)]
        self._prefix_affinity = prefix_affinity
        self._max_waiting_s = max_waiting_s
        self._choice: EngineChoice | None = None
        self._info: EngineInfo | None = None  # of the first one that was ready
        self._adapters: Mapping[str, AdapterInfo] = {}
        self._adapters_of: tuple[Mapping[str, AdapterInfo], ...] = ()  # that they were made of
        self._changing = asyncio.Lock()
        self._loading: set[asyncio.Task[object]] = set()  # for which nobody may wait any more
        self._tasks: list[asyncio.Task[None]] = []
        for replica in self._replicas:
            client = replica.client
            client.on_step.append(replica.step)
            client.on_loss.append(partial(self._lost, replica))
            client.wanted_adapters = partial(self._wanted_adapters, client)

    @property
    def is_healthy(self) -> bool:
        """Whether one of the engines is connected and gets on."""
        return any(self._is_usable(replica) for replica in self._replicas)

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """Those of all engines that are connected; while there is none, those that there were."""
        found = tuple(client.adapters for client in self._connected())
        if found and not _are_the_same(found, self._adapters_of):
            self._adapters_of = found
            self._adapters = _merged(found)
        return self._adapters

    def start(self) -> None:
        """Starts to connect, and to look for engines that do not get on."""
        for replica in self._replicas:
            replica.client.start()
        self._tasks.append(asyncio.create_task(self._watch(), name="engine pool"))

    async def ready(self) -> EngineInfo:
        """Waits for the first engine; all others must be like it."""
        waiting = [asyncio.create_task(one.client.ready()) for one in self._replicas]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        info = next(task for task in waiting if task in done).result()
        self._info = info
        self._choice = EngineChoice(info.block_size, prefix_affinity=self._prefix_affinity)
        return info

    async def close(self) -> None:
        """Ends the connections; requests that still run fail."""
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for replica in self._replicas:
            await replica.client.close()

    def end_streams(self, reason: str) -> None:
        """Fails all requests that still run, and those that are still to come."""
        for replica in self._replicas:
            replica.client.end_streams(reason)

    def new_request_id(self) -> str:
        """An id that no other request has."""
        return self._replicas[0].client.new_request_id()

    def generate(
        self, request: Request, on_end: Callable[[], object] = lambda: None
    ) -> AsyncGenerator[SequenceOutput]:
        """Yields a request's output of each step until it ends. Closing the iterator aborts it.

        Raises:
            ServiceError: no engine is connected, the call was aborted, or the request has waited
                too long for its first step.
        """
        return open_stream(request, on_end).outputs(self._submit, self._max_waiting_s)

    def abort(self, call: CallRecord) -> None:
        """Fails the requests of a call."""
        for replica in self._replicas:
            replica.client.abort(call)

    async def load_adapter(self, wanted: LoadAdapter) -> AdapterInfo | None:
        """Loads an adapter in all engines, or in none, also if the caller leaves meanwhile.

        One engine decides what it is. Those that are down get it when they are back.

        Raises:
            AdapterError: an engine cannot load it.
            ServiceError: no engine is connected, or the first one ended.
        """
        task = asyncio.create_task(self._load(wanted))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)
        return await asyncio.shield(task)

    async def _load(self, wanted: LoadAdapter) -> AdapterInfo | None:
        async with self._changing:
            before = self.adapters
            loaded = await self._first().load_adapter(wanted)
            if loaded is not None:
                exact = replace(wanted, replaces=True, digest=loaded.digest, call="")
                if (error := await self._load_everywhere(loaded, exact)) is not None:
                    for client in self._connected():
                        client.restore_adapters(before)
                    raise error
        return loaded

    async def unload_adapter(self, name: str, call: str = "") -> None:
        """Takes an adapter from all engines.

        Raises:
            AdapterError: none has any of this name.
            ServiceError: no engine is connected.
        """
        async with self._changing:
            self._first()
            unloading = (client.unload_adapter(name, call) for client in self._connected())
            errors = await asyncio.gather(*unloading, return_exceptions=True)
        if None not in errors:
            raise next(error for error in errors if error is not None)

    async def _load_everywhere(
        self, loaded: AdapterInfo, wanted: LoadAdapter
    ) -> AdapterError | None:
        """Loads in all other engines what one has loaded; returns why one of them cannot."""
        tried: list[EngineClient] = []
        while lacking := [
            client
            for client in self._connected()
            if client not in tried
            and (loaded.name, loaded.digest)
            not in ((one.name, one.digest) for one in client.listed)
        ]:
            tried += lacking
            errors = await asyncio.gather(*(_load_one_more(client, wanted) for client in lacking))
            if any(errors):
                return next(error for error in errors if error is not None)
        return None

    def _first(self) -> EngineClient:
        """The first engine that gets on, or else that is connected.

        Raises:
            ServiceError: there is none.
        """
        connected = self._connected()
        if not connected:
            raise unhealthy()
        return next((client for client in connected if client.is_healthy), connected[0])

    def _connected(self) -> list[EngineClient]:
        return [one.client for one in self._replicas if one.client.has_greeted]

    def _wanted_adapters(
        self,
        client: EngineClient,
        is_first: bool,
    ) -> Mapping[str, AdapterInfo] | None:
        """Those of the other engines, or those that there were before all were gone.

        Of an engine that was there before this process, they are added to its own.
        """
        others = [other.adapters for other in self._connected() if other is not client]
        if is_first and others:
            return _merged([*others, {one.name: one for one in client.listed}])
        if is_first:
            return None
        return _merged(others) if others else self._adapters

    def _submit(self, stream: Stream) -> None:
        replica = self._choose(stream)
        if replica is None:
            raise unhealthy()
        replica.client.submit(stream)

    def _choose(self, stream: Stream, lost: _Replica | None = None) -> _Replica | None:
        """The engine for a request; None if there is none, but for one that it is taken from."""
        connected = [one for one in self._replicas if one.client.has_greeted and one is not lost]
        usable = [one for one in connected if self._is_usable(one)]
        candidates = usable or ([] if lost else connected)
        candidates = [one for one in candidates if one.suits(stream)] or candidates
        if not candidates or self._choice is None:
            return None
        number = self._choice.choose(
            stream.computed_token_ids,
            stream.request.adapter,
            {one.number: one.load for one in candidates},
            [(image.start, image.digest) for image in stream.request.images],
        )
        return self._replicas[number]

    def _is_usable(self, replica: _Replica) -> bool:
        """Whether an engine gets on, and has the model that the others have."""
        info = replica.client.info
        if info is None or not replica.client.is_healthy:
            return False
        fits = replica.fitting.get(info.instance)
        if fits is None:
            fits = replica.fitting[info.instance] = self._fits(replica.number, info)
        return fits

    def _fits(self, number: int, info: EngineInfo) -> bool:
        expected = info if self._info is None else self._info
        for name in _SAME:
            given, wanted = getattr(info, name), getattr(expected, name)
            if given != wanted:
                logger.error(
                    "engine %d is not used: its %s is %s, and that of the others is %s",
                    number + 1, name, given, wanted,
                )  # fmt: skip
                return False
        return True

    def _lost(self, replica: _Replica) -> None:
        """An engine is gone, with its cache."""
        replica.num_foreign = 0
        if self._choice is not None:
            self._choice.forget(replica.number)
        self._move(replica)

    async def _watch(self) -> None:
        """Moves the requests of engines that are gone, leave or do not get on."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            self._adapters = self.adapters
            was_paused, looked = now - looked > 5 * _LOOK_S, now
            if was_paused:  # this process: what the engines said meanwhile is not read yet
                continue
            for replica in self._replicas:
                if not replica.client.is_healthy:
                    self._move(replica)

    def _move(self, lost: _Replica) -> None:
        """Lets the requests of an engine go on in others, as far as there are any."""
        is_leaving = lost.client.is_leaving
        is_stall = lost.client.is_connected and not is_leaving
        for stream in lost.client.unfinished():
            if is_leaving and stream.is_taken:  # it still ends those
                continue
            if is_stall and stream.num_stalls >= _MAX_STALLS:
                continue
            replica = self._choose(stream, lost)
            if replica is None:
                return
            if is_stall:
                stream.num_stalls += stream.lose_engine(lost.client.progress)
            lost.client.release(stream)
            stream.request_id = replica.client.new_request_id()
            replica.client.submit(stream)


async def _load_one_more(client: EngineClient, wanted: LoadAdapter) -> AdapterError | None:
    """Loads an adapter in one more engine; returns why it cannot.

    One that ends will be told to load it when it is back, and one that is just back may be loading
    it already.
    """
    try:
        await client.load_adapter(wanted)
    except ServiceError:
        return None
    except AdapterError as error:
        return None if error.fault is AdapterFault.LOADED else error
    return None


def _merged(found: Sequence[Mapping[str, AdapterInfo]]) -> dict[str, AdapterInfo]:
    """Adapters of several engines, by name, the first having the say."""
    return {name: one for adapters in reversed(found) for name, one in adapters.items()}


def _are_the_same(
    found: Sequence[Mapping[str, AdapterInfo]], before: Sequence[Mapping[str, AdapterInfo]]
) -> bool:
    return len(found) == len(before) and all(
        one is other for one, other in zip(found, before, strict=True)
    )
