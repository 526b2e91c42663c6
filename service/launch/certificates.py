"""Tells Envoy when the certificates of the public port have changed.

Envoy by itself notices only what is moved into a directory, not a file that is written again, nor a
link that is made anew, as certbot does. So `serve` looks at the files, checks them, and moves
something into a directory that Envoy watches.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..access.certificates import TlsFiles
from ..access.watched import Watched

_POLL_S = 1.0


async def follow_certificates(files: TlsFiles, directory: Path) -> None:
    """Watches the files until it is cancelled.

    Args:
        files: what Envoy reads.
        directory: what Envoy watches.
    """

    def tell() -> None:
        files.check()
        mark = directory / "certificates-changed.new"
        mark.touch()
        mark.replace(mark.with_suffix(""))

    watched = Watched("the certificates of the public port", files.paths, tell)
    while True:
        await asyncio.sleep(_POLL_S)
        await asyncio.to_thread(watched.current)
