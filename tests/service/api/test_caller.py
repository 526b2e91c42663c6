"""Who a call is from: what the caller says it is, or the address that can be believed."""

from __future__ import annotations

from typing import Any

import pytest

from service.api.caller import address_of, caller_of


class FakeContext:
    """A call from the address 10.0.0.7."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata

    def peer(self) -> str:
        return "ipv4:10.0.0.7:4711"


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:4711", "10.0.0.7"),
        ("ipv6:%5B::1%5D:4711", "::1"),
        ("ipv6:[2001:db8::2]:50", "2001:db8::2"),
        ("unix:", "unix"),
    ],
)
def test_connections_of_one_address_are_one_caller(peer: str, address: str) -> None:
    assert address_of(peer, (), from_gateway=False) == address


def test_only_the_gateway_is_believed_about_addresses() -> None:
    forwarded = ("x-forwarded-for", "1.1.1.1, 192.0.2.9")
    assert caller_of(context(forwarded), from_gateway=False) == "10.0.0.7"
    assert caller_of(context(forwarded), from_gateway=True) == "192.0.2.9"


def test_last_of_several_headers_is_the_gateways() -> None:
    forged, real = ("x-forwarded-for", "1.1.1.1"), ("x-forwarded-for", "192.0.2.9")
    assert caller_of(context(forged, real), from_gateway=True) == "192.0.2.9"


def test_calls_of_envoy_itself_have_a_name() -> None:
    assert caller_of(context(), from_gateway=True) == "gateway"


@pytest.mark.parametrize("from_gateway", [False, True])
def test_a_caller_may_say_which_tenant_it_is(from_gateway: bool) -> None:
    tenant = ("x-tenant", "team-a")
    assert caller_of(context(tenant), from_gateway=from_gateway) == "team-a"


@pytest.mark.parametrize("tenant", ["", "two words", "x" * 129, "line\nbreak", "é"])
def test_a_tenant_that_would_garble_the_log_is_ignored(tenant: str) -> None:
    assert caller_of(context(("x-tenant", tenant)), from_gateway=False) == "10.0.0.7"


def context(*metadata: tuple[str, str | bytes]) -> Any:
    """A call with this metadata."""
    return FakeContext(*metadata)
