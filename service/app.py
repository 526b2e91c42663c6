"""Connects the components of a service and runs them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.protocol.config import EngineInfo
from engine.protocol.notify import ALIVE, READY, notify

from .access.certificates import server_credentials
from .api import health, rpc
from .api.calls_in_progress import CallsInProgress
from .api.grpc_server import bind, make_server
from .api.reflection import add_reflection
from .api.servicer import TextGenerationServicer
from .components import (
    load_tokenizer,
    make_adapters,
    make_authenticator,
    make_engines,
    make_grammar_checker,
    make_images,
    make_long_texts,
    make_server_info,
    make_trace_sender,
)
from .generation.admission import Admission
from .generation.configured_limits import make_limits
from .generation.engine_client import EngineClient
from .generation.generator import Generator
from .generation.load import LoadMeter
from .generation.metrics import HELD, Metrics
from .generation.pipeline import Pipeline
from .generation.pushed_metrics import pushed_metrics
from .generation.server_info import ServerInfo
from .generation.validation import Validator
from .grammar.checker import GrammarChecker
from .images.images import Images
from .launch import envoy_admin
from .launch.place import Place, own_place
from .launch.settings import Settings
from .routes import SERVICE
from .siblings.permits import SharedPermits
from .siblings.series import SharedSeries
from .siblings.siblings import Siblings
from .workers.heap import keep_pages
from .workers.lanes import Lanes

if TYPE_CHECKING:  # else libraries would be imported that most servers do not need
    from .tracing.tracer import CallTracer

logger = logging.getLogger(__name__)

_HEALTH_INTERVAL_S = 0.2
_BEAT_S = 0.5  # between two signs of life of the event loop
_LAST_WORDS_S = 2.0  # for streams to end with an error, before the calls are cut
_LAST_WORDS = "the server is shutting down"
# After this time a thread that computes lets the event loop run, if that waits. Python's default,
# 5 ms, is much for a loop that takes the lock several times for each token it sends: with 0.5 ms a
# turn for eight streams took 5 to 10 ms beside such a thread.
_SWITCH_S = 0.0001

# New objects between two looks for garbage, which take 0.2 to 0.6 us for each, and looks between
# two at those that have outlived one. Python's default, 700, is less than one message of the engine
# for 256 streams brings, whose objects are all gone before the next. A look at all objects holds up
# every stream for tens of milliseconds, so it comes once in ten million new ones. What calls leave
# is found before; large requests have it looked for (`Lanes`).
_GC_THRESHOLDS = (2_500, 1, 2_000)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class App:
    """One service process.

    Args:
        settings: what it is started with; `engine_socket` must be set.
        place: which of several service processes it is; None if there is one.

    Raises:
        OSError, ValueError: the file of API keys, a certificate, or a variable of OpenTelemetry's
            cannot be used.
    """

    def __init__(self, settings: Settings, place: Place | None = None) -> None:
        assert settings.engine_socket is not None
        self._place = place
        self._settings = settings
        max_waiting_s = settings.max_waiting_seconds or None
        self._clients = [
            EngineClient(path, max_waiting_s=max_waiting_s) for path in settings.engine_sockets
        ]
        self._engines = make_engines(self._clients, settings)
        self._admission = Admission(
            settings.max_concurrent_requests,
            settings.max_concurrent_requests_per_caller,
            None if place is None else SharedPermits(place, 2 * settings.max_concurrent_requests),
        )
        self._siblings: Siblings | None = None
        self._health = health.HealthServicer()
        self._stopping = asyncio.Event()
        self._servers: list[aio.Server] = []  # for callers
        self._gateways: list[aio.Server] = []  # for Envoy
        self._gateway_calls = CallsInProgress()
        self._grammars: GrammarChecker | None = None
        self._authenticator = make_authenticator(settings)
        self._credentials = settings.grpc_tls and server_credentials(settings.grpc_tls)
        self._lanes = Lanes(settings.max_pending_bytes)
        self._long_texts = make_long_texts(settings)
        self._images: Images | None = None
        self._traces = make_trace_sender(settings, place)
        self._pushed = pushed_metrics(settings.model_id, settings.metric_export(os.environ), place)
        self._starting: list[asyncio.Task[None]] = []  # of processes, for which nobody waits
        self._sampling: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Waits for the engine, then listens.

        Raises:
            ValueError: the tokenizer or the limits do not fit.
            OSError: the port is in use.
        """
        settings = self._settings
        self._engines.start()
        tokenizer = await asyncio.to_thread(load_tokenizer, settings)
        tokenizer.long_texts = self._long_texts
        self._starting.append(asyncio.create_task(self._long_texts.start()))
        info = await self._engines.ready()
        tokenizer.fit(info.vocab_size)
        limits = make_limits(settings, info)
        adapters = make_adapters(settings, info, self._engines)
        server_info = make_server_info(settings, info, limits, tokenizer, adapters)
        metrics = self._metrics(server_info)
        self._sampling = asyncio.create_task(metrics.loop_lag.sample())
        self._grammars = make_grammar_checker(settings, info, tokenizer, metrics)
        self._starting.append(asyncio.create_task(self._grammars.start()))
        if limits.max_images:
            self._images = make_images(settings, limits)
            self._starting.append(asyncio.create_task(self._images.start()))
        pipeline = Pipeline(
            self._admission,
            Validator(limits, tokenizer, self._grammars, adapters),
            Generator(self._engines, tokenizer),
            metrics,
            own_calls_only=settings.api_key_file is not None,
        )
        meter = self._load_meter()
        await self._meet_siblings(metrics, pipeline)
        servicer = TextGenerationServicer(
            pipeline,
            tokenizer,
            self._engines,
            server_info,
            metrics,
            meter,
            self._lanes,
            self._siblings,
            self._images,
        )
        self.port = await self._listen(servicer, metrics, settings.grpc_address)
        for address in settings.gateway_addresses:
            await self._listen(servicer, metrics, address, from_gateway=True)
        logger.info("service ready on %s:%d", settings.grpc_host, self.port)

    async def _meet_siblings(self, metrics: Metrics, pipeline: Pipeline) -> None:
        """Shares series and aborts with the other service processes, if there are any."""
        if self._place is not None:
            series = SharedSeries(self._place, metrics.source, HELD)
            self._siblings = Siblings(self._place, series, pipeline.abort)
            await self._siblings.open()

    async def run(self) -> None:
        """Serves until `stop`, then refuses new generations and waits for the running ones."""
        watcher = asyncio.create_task(self._watch_health())
        await self._stopping.wait()
        watcher.cancel()
        if self._sampling is not None:
            self._sampling.cancel()
        self._health.end()
        self._admission.close()
        logger.info("draining %d requests", self._admission.num_active)
        await self._end_calls(self._settings.drain_seconds)
        await self._engines.close()
        if self._siblings is not None:
            await self._siblings.close()
        await self._close_workers()
        if self._traces is not None:
            await self._traces.close()
        if self._pushed is not None:
            await self._pushed.close()

    async def _close_workers(self) -> None:
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        if self._grammars is not None:
            await self._grammars.close()
        await self._long_texts.close()
        if self._images is not None:
            await self._images.close()
        self._lanes.close()

    async def _end_calls(self, grace: float) -> None:
        """Lets calls finish; streams that are left shortly before the end get an error.

        However short the time is, these have `_LAST_WORDS_S` for it: a call that is cut ends over
        REST as if it were whole.
        """
        loop = asyncio.get_running_loop()
        until = max(grace - _LAST_WORDS_S, grace / 2)
        last_words = loop.call_later(until, self._engines.end_streams, _LAST_WORDS)
        cut = max(grace, until + _LAST_WORDS_S)
        stopping = [server.stop(cut) for server in self._servers]
        await asyncio.gather(*stopping, self._stop_gateways(cut))
        last_words.cancel()

    async def _stop_gateways(self, grace: float) -> None:
        """Until the last call of a caller has ended, operators see how things are, and end calls.

        To Envoy this process is not well, so only they are sent here.
        """
        deadline = time.monotonic() + grace
        with contextlib.suppress(OSError):  # a timeout is one, too
            async with asyncio.timeout(grace):
                await self._gateway_calls.none()
                # Of a stream that it reads, Envoy drops the rest once the connection is closed.
                if (socket := self._settings.gateway_socket) is not None:
                    await envoy_admin.until_taken(socket)
        left = max(deadline - time.monotonic(), 0)
        await asyncio.gather(*(server.stop(left) for server in self._gateways))

    def stop(self) -> None:
        """Asks `run` to drain and return; asked again, generations end at once with an error."""
        if self._stopping.is_set():
            self._engines.end_streams(_LAST_WORDS)
        self._stopping.set()

    async def stopped(self) -> None:
        """Returns when `stop` was called."""
        await self._stopping.wait()

    def _metrics(self, server: ServerInfo) -> Metrics:
        """Makes the metrics, which are updated after every step of the engine."""
        limits = server.limits
        pushed = () if self._pushed is None else (self._pushed,)
        metrics = Metrics(
            limits,
            *pushed,
            speculate=self._settings.speculate,
            is_healthy=lambda: self._engines.is_healthy,
        )
        metrics.describe(server)
        metrics.watch(self._admission, limits)
        metrics.calls.expect_methods(rpc.method_names())
        metrics.calls.expect_callers(self._authenticator.names())
        for number, client in enumerate(self._clients, start=1):
            # So that gauges are right before the next message.
            metrics.engine.step(client.last_step, number)
            client.on_step.append(partial(metrics.engine.step, engine=number))
            client.on_tally.append(metrics.requests.step)
            client.on_restart.append(lambda info: self._engine_restarted(metrics, info))
        if len(self._clients) > 1:
            self._tell_engines_apart(metrics)
        return metrics

    def _tell_engines_apart(self, metrics: Metrics) -> None:
        """Shows each of several engines, and forgets what one has told that is gone."""
        for number, client in enumerate(self._clients, start=1):
            metrics.engine.show(number, partial(getattr, client, "is_healthy"))
            client.on_loss.append(partial(metrics.engine.lost, number))

    def _load_meter(self) -> LoadMeter:
        meter = LoadMeter()
        for number, client in enumerate(self._clients, start=1):
            client.on_step.append(partial(meter.step, engine=number))
            if len(self._clients) > 1:
                client.on_loss.append(partial(meter.lost, number))
        return meter

    def _engine_restarted(self, metrics: Metrics, info: EngineInfo) -> None:
        """Counts a new engine, which all service processes meet, once."""
        if self._siblings is None or self._siblings.claims_engine(info.instance):
            metrics.engine.restarted()

    async def _listen(
        self,
        servicer: TextGenerationServicer,
        metrics: Metrics,
        address: str,
        *,
        from_gateway: bool = False,
    ) -> int:
        """Serves on one more address; returns its port, or something else for a socket's path.

        Raises:
            OSError: the address is in use, or not for us.
        """
        server = make_server(
            self._settings,
            metrics,
            from_gateway=from_gateway,
            authenticator=self._authenticator,
            tracer=self._tracer(),
            running=self._gateway_calls if from_gateway else None,
            shares_ports=self._place is not None,
        )
        pool = rpc.load_pool()
        handlers = rpc.handlers(
            servicer, pool, servicer.limits, self._lanes, from_gateway=from_gateway
        )
        server.add_generic_rpc_handlers((handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection(server, pool, (SERVICE, health.SERVICE_NAME))
        credentials = None if from_gateway else self._credentials
        try:
            port = bind(server, address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: is it in use?") from error
        await server.start()
        (self._gateways if from_gateway else self._servers).append(server)
        return port

    def _tracer(self) -> CallTracer | None:
        if self._traces is None:
            return None
        content = self._settings.otlp_content
        return self._traces.tracer(self._settings.model_id, captures_content=content)

    async def _watch_health(self) -> None:
        """Keeps the status of grpc.health.v1 equal to the engine client's health."""
        while True:
            status = _SERVING if self._engines.is_healthy else _NOT_SERVING
            for name in ("", SERVICE):
                self._health.set(name, status)
            await asyncio.sleep(_HEALTH_INTERVAL_S)


async def serve(settings: Settings) -> None:
    """Runs a service until SIGTERM or SIGINT.

    Raises:
        ValueError: the settings do not fit the model.
        OSError: the port is in use.
    """
    keep_pages()
    sys.setswitchinterval(_SWITCH_S)
    app = App(settings, own_place())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, app.stop)
    beat = asyncio.create_task(_beat())
    try:
        await _run(app)
    finally:
        beat.cancel()


async def _run(app: App) -> None:
    """Starts a service and runs it until it is stopped."""
    start = asyncio.create_task(app.start())
    stopped = asyncio.create_task(app.stopped())
    await asyncio.wait((start, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not start.done():  # stopped while waiting for the engine
        start.cancel()
        return
    stopped.cancel()
    await start
    gc.collect()
    gc.freeze()  # these objects stay: every full collection would visit them for 200 ms
    gc.set_threshold(*_GC_THRESHOLDS)
    notify(READY)
    await app.run()


async def _beat() -> None:
    """Tells the watcher of this process that its event loop runs."""
    while True:
        notify(ALIVE)
        await asyncio.sleep(_BEAT_S)
