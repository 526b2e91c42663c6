"""Runs engine, service and Envoy as children: starts, watches, restarts and drains them.

To the supervisor a child is a name and a command. Torch is never loaded here, and gRPC only by the
probe that uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.protocol.notify import VARIABLE as NOTIFY_SOCKET

from ..log_lines import FIELDS
from ..parent import ignore_hangup
from .child import Child
from .open_files import raise_limit
from .plan import Plan, Stage, held_ports, make_plan
from .private_directory import private_directory
from .racing import first
from .settings import Settings
from .sources import without_settings
from .watch import Probe, Watch, until_silent

logger = logging.getLogger(__name__)

_POLL_S = 0.1  # between two probes
_LOG_AGAIN_S = 10.0  # how often the progress of a stage is logged

# How long each child may take to end, after the service has drained.
_STOP_S = 10.0
# How long Envoy has, at least, to hand over what services have answered.
_DELIVERY_S = 1.0
# How long all may take after a second signal, by which calls are ended with an error.
_HURRY_S = 3.0
# In this order: services end their calls while Envoy still carries them and the engine computes.
_STOP_ORDER = ("service", "envoy", "engine")


class SupervisorError(Exception):
    """The server could not be started or kept running; `str()` is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a child that died is started again. Times are seconds.

    Where another one does the same work, as one of several engines or services, a child that dies
    too often does not end the server: it is tried again every `window` seconds.

    Attributes:
        first_delay: the delay after the first death; each further one doubles it.
        max_delay: the longest delay.
        healthy_after: a child that lived this long starts from the first delay again.
        max_deaths: this many deaths in a row within `window` end the server.
        window: see `max_deaths`.
    """

    first_delay: float = 0.1
    max_delay: float = 5.0
    healthy_after: float = 30.0
    max_deaths: int = 5
    window: float = 60.0

    def delay(self, num_deaths: int) -> float:
        """Returns the delay after so many deaths in a row."""
        doublings = min(num_deaths - 1, 30)  # far beyond any delay, and still a float
        return min(self.first_delay * 2.0**doublings, self.max_delay)

    def is_hopeless(self, deaths: list[float]) -> bool:
        """Whether restarts should end after deaths in a row at these times."""
        recent = deaths[-self.max_deaths :]
        return len(recent) == self.max_deaths and recent[-1] - recent[0] <= self.window


class Supervisor:
    """Runs one server until it is told to stop.

    Args:
        settings: what the server is started with.
        plan: makes the plan, in a thread, once the private directory is there.
        policy: when children are restarted.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        plan: Callable[[Settings, Path], Plan] = make_plan,
        policy: RestartPolicy | None = None,
    ) -> None:
        self._settings = settings
        self._make_plan = plan
        self._policy = policy or RestartPolicy()
        self._plan: Plan | None = None
        self._children: list[Child] = []
        self._hopeless: set[Child] = set()  # that died too often, where others do their work
        self._stopping = asyncio.Event()
        self._num_signals = 0

    async def run(self) -> int:
        """Returns the exit code: 0 after a clean drain, 1 after a second signal.

        After the first signal calls may end within the drain's time; after the second one they end
        at once, with an error; after a third one, or if that takes long, everything is killed.

        Raises:
            SupervisorError: a child failed at the start, or too often later.
            OSError: a port cannot be used, or there is no Envoy.
            ValueError: Envoy refuses its configuration.
        """
        with (
            held_ports(self._settings) as settings,
            private_directory() as runtime,
            self._signals(),
        ):
            plan = await asyncio.to_thread(self._make_plan, settings, runtime)
            if (warning := raise_limit(plan.max_connections)) is not None:
                logger.warning("%s", warning)
            self._plan, self._children = plan, _children(plan)
            may_have_calls = False
            try:
                await self._start(plan)
                may_have_calls = True
                watching = [] if plan.watch is None else [plan.watch()]
                keeping = map(self._keep_alive, self._children)
                await first(self._stopping.wait(), *keeping, *watching)
                await self._drain(plan)
                may_have_calls = False
            finally:
                await self._stop(at_once=may_have_calls)
        return 0 if self._num_signals < 2 else 1

    async def _start(self, plan: Plan) -> None:
        """Starts the children and waits until the last stage is reached, or a signal."""
        for child in self._children:
            await self._start_child(child)
        await first(
            self._stopping.wait(),
            _reach(plan.stages),
            *map(self._fail_on_end, self._children),
        )
        if not self._stopping.is_set():
            self._announce(plan)

    def _announce(self, plan: Plan) -> None:
        if self._settings.json_output:
            logger.info("Tokenwire is ready", extra={FIELDS: plan.addresses})
            return
        sys.stdout.write(plan.banner)
        sys.stdout.flush()

    async def _keep_alive(self, child: Child) -> None:
        """Restarts a child whenever it ends; raises when that is hopeless."""
        deaths: list[float] = []
        while True:
            await self._end(child)
            if child.age() >= self._policy.healthy_after:
                deaths.clear()
                self._hopeless.discard(child)
            ending: str | None = child.ending()
            while ending is not None:
                ending = await self._restart(child, deaths, ending)

    async def _restart(self, child: Child, deaths: list[float], ending: str) -> str | None:
        """Starts a child again after one more death; returns why it cannot be started.

        The machine may have no memory for it just now, or no place for a process: as another death.
        """
        deaths.append(time.monotonic())
        delay = self._policy.delay(len(deaths))
        if self._policy.is_hopeless(deaths):
            if not self._has_substitute(child):
                raise SupervisorError(f"giving up after {len(deaths)} deaths: {ending}")
            self._hopeless.add(child)
            delay = self._policy.window
        logger.error("%s; restarting it in %.1f s", ending, delay)
        await asyncio.sleep(delay)
        try:
            await self._start_child(child)
        except OSError as error:
            return f"{child.name} cannot be started: {error}"
        return None

    def _has_substitute(self, child: Child) -> bool:
        """Whether another child does the same work, and does not die all the time as well."""
        others = {other for other in self._children if other.role == child.role} - {child}
        return bool(others - self._hopeless)

    async def _start_child(self, child: Child) -> None:
        if (watch := self._watch(child)) is not None:
            watch.begin()
        await child.start()

    async def _fail_on_end(self, child: Child) -> None:
        await self._end(child)
        raise SupervisorError(child.ending())

    async def _end(self, child: Child) -> None:
        """Waits for a child's end, and brings it about if the child is frozen."""
        await first(child.wait(), self._kill_if_frozen(child))

    async def _kill_if_frozen(self, child: Child) -> None:
        if (watch := self._watch(child)) is not None:
            seconds = await until_silent(watch, self._settings.engine_stall_seconds)
            child.kill(f"no sign of life for {seconds:.0f} s")
        await child.wait()

    def _watch(self, child: Child) -> Watch | None:
        assert self._plan is not None
        return self._plan.signs_of_life.get(child.name)

    async def _drain(self, plan: Plan) -> None:
        """Lets services end their calls, while engines that die are restarted for these."""
        until = time.monotonic() + self._settings.drain_seconds
        if plan.drain is not None:
            await _tell(plan.drain)
        seconds = _STOP_S + self._settings.drain_seconds
        hopeful = [child for child in self._children if child not in self._hopeless]
        keeping = [self._keep_alive(child) for child in hopeful if child.role == "engine"]
        await first(self._stop_all("service", seconds), *keeping)
        if plan.is_delivered is not None:
            await _deliver(plan.is_delivered, until)

    async def _stop(self, *, at_once: bool) -> None:
        """Ends the children that there still are, role by role.

        Args:
            at_once: whether services are to end their calls with an error.
        """
        for role in dict.fromkeys((*_STOP_ORDER, *(child.role for child in self._children))):
            await self._stop_all(role, _STOP_S, at_once=at_once and role == _STOP_ORDER[0])

    async def _stop_all(self, role: str, seconds: float, *, at_once: bool = False) -> None:
        children = [child for child in self._children if child.role == role]
        await asyncio.gather(*(child.stop(seconds, at_once=at_once) for child in children))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, ignore_hangup)
        try:
            yield
        finally:
            for number in (*numbers, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        self._num_signals += 1
        self._stopping.set()
        if self._num_signals == 1:
            logger.info("%s: draining; once more to stop at once", number.name)
        elif self._num_signals == 2:
            for child in self._children:
                if child.role == "service":
                    child.hurry()
            asyncio.get_running_loop().call_later(_HURRY_S, self._kill_all)
        else:
            self._kill_all()

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()


async def _tell(drain: Callable[[], Awaitable[None]]) -> None:
    try:
        await drain()
    except OSError as error:
        logger.warning("stopping without a drain: %s", error)


async def _deliver(is_delivered: Probe, until: float) -> None:
    """Waits for callers who read slowly, as long as Envoy lives, and for `_DELIVERY_S` at least."""
    until = max(until, time.monotonic() + _DELIVERY_S)
    with contextlib.suppress(OSError):
        while time.monotonic() < until and not await is_delivered():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)


async def _reach(stages: tuple[Stage, ...]) -> None:
    """Waits for the stages one by one; logs each when it begins and ends, and if it takes long."""
    for stage in stages:
        started = logged = time.monotonic()
        logger.info("%s ...", stage.progress)
        while not await stage.reached():
            await asyncio.sleep(_POLL_S)
            if time.monotonic() - logged >= _LOG_AGAIN_S:
                logged = time.monotonic()
                logger.info("%s ... (%.0f s)", stage.progress, logged - started)
        logger.info("%s took %.1f s", stage.progress, time.monotonic() - started)


def _children(plan: Plan) -> list[Child]:
    """The children, which see neither our settings nor the socket on which we are watched."""
    shared = without_settings(os.environ)
    shared.pop(NOTIFY_SOCKET, None)
    watched = {name: watch.environment for name, watch in plan.signs_of_life.items()}
    return [
        Child(
            name,
            command,
            {**shared, **watched.get(name, {}), **plan.environments.get(name, {})},
            plan.processors.get(name, frozenset()),
        )
        for name, command in plan.commands.items()
    ]
