"""Lets an event loop do what else is due, between two parts of work that take milliseconds."""

from __future__ import annotations

import asyncio


async def pause() -> None:
    """Lets everything run that is due now.

    Twice, since the loop looks for what has come in after it has put this task back in its queue:
    with one turn only, two parts would run one right after the other.
    """
    await asyncio.sleep(0)
    await asyncio.sleep(0)
