"""Envoy alone, as `tokenwire envoy` runs it: told to end, it lets its calls end first.

Envoy itself would break them off. Where the supervisor runs all processes, the service ends them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from ..parent import die_with_parent, ignore_hangup
from . import envoy_admin
from .racing import first

logger = logging.getLogger(__name__)

_POLL_S = 0.1  # between two looks at the calls
_STOP_S = 10.0  # for Envoy's end, without calls


async def run(
    command: list[str],
    admin: Path | int,
    drain_seconds: float,
    watch: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> int:
    """Runs Envoy until it ends, or SIGTERM or SIGINT asks for that; a second one ends it at once.

    Args:
        command: that of Envoy.
        admin: the socket or port of its admin interface.
        drain_seconds: how long calls may go on after a signal.
        watch: runs as long as Envoy does, if there is something to watch.

    Returns:
        The exit code: Envoy's own if it ended by itself, otherwise 0.
    """
    told, told_again = _signals()
    process = await asyncio.create_subprocess_exec(
        *command,
        start_new_session=True,  # the terminal's Ctrl-C is for this process alone
        preexec_fn=die_with_parent(os.getpid()),
    )
    watching = None if watch is None else asyncio.create_task(watch())
    try:
        return await _until_told(process, admin, drain_seconds, told, told_again)
    finally:
        if watching is not None:
            watching.cancel()


async def _until_told(
    process: Process,
    admin: Path | int,
    drain_seconds: float,
    told: asyncio.Event,
    told_again: asyncio.Event,
) -> int:
    """Waits for the process, or ends it after a signal; returns the exit code."""
    await first(process.wait(), told.wait())
    if not told.is_set():
        return process.returncode or 1  # nobody asked for its end
    logger.info("draining; once more to stop at once")
    await first(process.wait(), told_again.wait(), _drain(admin, drain_seconds))
    await _stop(process)
    return 0


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events that are set when a first and a second signal asks for the end."""
    told, told_again = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (told_again if told.is_set() else told).set())
    loop.add_signal_handler(signal.SIGHUP, ignore_hangup)
    return told, told_again


async def _drain(admin: Path | int, seconds: float) -> None:
    """Closes the public port, asks connections to close, and waits until no call is left."""
    deadline = time.monotonic() + seconds
    try:
        await envoy_admin.drain(admin)
        await envoy_admin.close_port(admin)
        while calls := await envoy_admin.num_calls(admin):
            if time.monotonic() > deadline:
                logger.warning("%d calls have not ended within %g s", calls, seconds)
                return
            await asyncio.sleep(_POLL_S)
    except OSError as error:
        logger.warning("stopping without a drain: %s", error)


async def _stop(process: Process) -> None:
    """Ends Envoy, whatever it does."""
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
