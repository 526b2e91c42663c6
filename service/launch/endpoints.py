"""The file with the addresses of servers, and the one that Envoy makes of it and follows.

The operator's file is plain: an address per line, `#` begins a comment. Envoy's own form of it is
written beside its configuration, and moved into place, which is what Envoy notices.
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from ..access.watched import Watched
from .servers import Address, parse_addresses

logger = logging.getLogger(__name__)

CLUSTER = "service"
_RESOURCE = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
_POLL_S = 1.0
_MAX_BYTES = 1 << 20


def read_endpoints(path: Path) -> tuple[Address, ...]:
    """Reads the operator's file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no address, or one that is none; the text is one line.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES} bytes")
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    try:
        addresses = parse_addresses(filter(None, lines))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not addresses:
        raise ValueError(f"{path} has no address")
    for address in addresses:
        if address.is_name:
            raise ValueError(f"{path}: {address} is not an IP address with a port")
    return addresses


def write_endpoints(addresses: tuple[Address, ...], target: Path) -> None:
    """Writes the addresses as Envoy reads them, and moves the file into place."""
    new = target.with_suffix(".new")
    new.write_text(_discovery(addresses), encoding="utf-8")
    new.replace(target)


async def follow_endpoints(path: Path, target: Path) -> None:
    """Keeps Envoy's file like the operator's one until it is cancelled.

    A file that cannot be read any more changes nothing but the log.
    """
    watched = Watched("the addresses of servers", (path,), lambda: read_endpoints(path))
    written = None
    while True:
        addresses = await asyncio.to_thread(watched.current)
        if addresses != written:
            try:
                await asyncio.to_thread(write_endpoints, addresses, target)
                written = addresses
            except OSError as error:
                logger.error("Envoy cannot be told the addresses of servers: %s", error)
        await asyncio.sleep(_POLL_S)


def _discovery(addresses: tuple[Address, ...]) -> str:
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": it.host, "port_value": it.port}}}}
        for it in addresses
    ]
    assignment = {
        "@type": _RESOURCE,
        "cluster_name": CLUSTER,
        "endpoints": [{"lb_endpoints": endpoints}],
    }
    return json.dumps({"resources": [assignment]})
