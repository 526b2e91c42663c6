"""Who makes a call: one name, for log lines, and for what is counted or shared by caller.

The name is, whichever comes first: that of the API key; that in the caller's certificate; where
there are no keys, the tenant that the caller says it is; its address.

Only the gateway is believed about callers: it writes x-envoy-external-address with the address that
it sees, and x-forwarded-client-cert with the certificate that it has verified. x-forwarded-for may
have anything in it, and the gateway's own address for callers on its machine.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import Any

from grpc import aio

TENANT_HEADER = "x-tenant"
EXTERNAL_ADDRESS = "x-envoy-external-address"
_CLIENT_CERTIFICATE = "x-forwarded-client-cert"

_VALID_TENANT = re.compile(r"[!-~]{1,128}")  # visible ASCII: it goes into log lines
_UNPRINTABLE = re.compile(r"[^!-~]")
_MAX_NAME = 128

# An element of x-forwarded-client-cert: URI=spiffe://a/b, or Subject="CN=alice,O=\"A, B\"".
_ELEMENT = re.compile(r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|([^;,]*))')
_RDN = re.compile(r"((?:\\.|[^\\,+])+)")  # one of CN=alice,O=A\, B


def caller_of(
    context: aio.ServicerContext[Any, Any],
    *,
    from_gateway: bool,
    key_name: str | None = None,
    takes_tenants: bool = True,
) -> str:
    """The caller's name.

    Args:
        context: the call, as grpc.aio has it.
        from_gateway: whether it arrived at the gateway's address.
        key_name: the owner of its API key.
        takes_tenants: whether callers are believed which tenant they are.
    """
    if key_name is not None:
        return key_name
    metadata = tuple(context.invocation_metadata() or ())
    name = _forwarded_name(metadata) if from_gateway else _certified_name(context.auth_context())
    if name:
        return _UNPRINTABLE.sub("_", name)[:_MAX_NAME]
    tenant = last_value(metadata, TENANT_HEADER)
    if takes_tenants and tenant is not None and _VALID_TENANT.fullmatch(tenant):
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
        return last_value(metadata, EXTERNAL_ADDRESS) or "gateway"
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind


def last_value(metadata: Any, name: str) -> str | None:
    """The text that `name` has in a call's metadata; the last one, where there are several."""
    values = [value for key, value in metadata or () if key == name and isinstance(value, str)]
    return values[-1] if values else None


def _certified_name(certificate: Any) -> str | None:
    """The name in a certificate that gRPC has verified: a URI, or a DNS name, or the CN."""
    for name in ("peer_uri", "peer_dns", "x509_common_name"):
        if values := certificate.get(name):
            return str(values[0].decode(errors="replace"))
    return None


def _forwarded_name(metadata: Any) -> str | None:
    """The same of a certificate that Envoy has verified."""
    elements: dict[str, str] = {}
    for name, quoted, plain in _ELEMENT.findall(last_value(metadata, _CLIENT_CERTIFICATE) or ""):
        elements.setdefault(name, re.sub(r"\\(.)", r"\1", quoted) or plain)
    return elements.get("URI") or elements.get("DNS") or _common_name(elements.get("Subject", ""))


def _common_name(subject: str) -> str | None:
    """The CN of a subject as RFC 2253 writes it."""
    names = [part[3:] for part in _RDN.findall(subject) if part.startswith("CN=")]
    return re.sub(r"\\(.)", r"\1", names[0]) if names else None
