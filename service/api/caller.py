"""Who makes a call: one name, for log lines, and for what is counted or shared by caller.

Only the gateway is believed about the address of others: it appends the one that it sees to
x-forwarded-for, whose last entry therefore is its own.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import Any

from grpc import aio

TENANT_HEADER = "x-tenant"
FORWARDED_FOR = "x-forwarded-for"
_VALID_TENANT = re.compile(r"[!-~]{1,128}")  # visible ASCII: it goes into log lines


def caller_of(context: aio.ServicerContext[Any, Any], *, from_gateway: bool) -> str:
    """The caller's name: the tenant that it says it is, or else its address without a port."""
    metadata = tuple(context.invocation_metadata() or ())
    tenant = last_value(metadata, TENANT_HEADER)
    if tenant is not None and _VALID_TENANT.fullmatch(tenant):
        return tenant
    return address_of(context.peer(), metadata, from_gateway=from_gateway)


def address_of(peer: str, metadata: Any, *, from_gateway: bool) -> str:
    """The IP address that a call comes from; `gateway` for the calls that Envoy makes for itself.

    Args:
        peer: as gRPC writes it, e.g. `ipv4:10.0.0.7:4711` or `ipv6:%5B::1%5D:4711`.
        metadata: the call's.
        from_gateway: whether it arrived at the gateway's address.
    """
    if from_gateway:
        forwarded = last_value(metadata, FORWARDED_FOR)
        return "gateway" if forwarded is None else forwarded.rpartition(",")[2].strip()
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind


def last_value(metadata: Any, name: str) -> str | None:
    """The text that `name` has in a call's metadata; the last one, where there are several."""
    values = [value for key, value in metadata or () if key == name and isinstance(value, str)]
    return values[-1] if values else None
