"""Who a call is from: what the caller says it is, or the address that can be believed."""

from __future__ import annotations

from typing import Any

import pytest

from service.api.caller import address_of, caller_of


class FakeContext:
    """A call from the address 10.0.0.7."""

    def __init__(self, *metadata: tuple[str, str | bytes], **certificate: list[bytes]) -> None:
        self._metadata = metadata
        self._certificate = certificate

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._certificate

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
    forwarded = ("x-envoy-external-address", "192.0.2.9")
    assert caller_of(context(forwarded), from_gateway=False) == "10.0.0.7"
    assert caller_of(context(forwarded), from_gateway=True) == "192.0.2.9"


def test_what_proxies_before_the_gateway_say_is_not_believed() -> None:
    said, seen = ("x-forwarded-for", "1.1.1.1"), ("x-envoy-external-address", "192.0.2.9")
    assert caller_of(context(said, seen), from_gateway=True) == "192.0.2.9"


def test_calls_of_envoy_itself_have_a_name() -> None:
    assert caller_of(context(), from_gateway=True) == "gateway"


@pytest.mark.parametrize("from_gateway", [False, True])
def test_a_caller_may_say_which_tenant_it_is(from_gateway: bool) -> None:
    tenant = ("x-tenant", "team-a")
    assert caller_of(context(tenant), from_gateway=from_gateway) == "team-a"


@pytest.mark.parametrize("tenant", ["", "two words", "x" * 129, "line\nbreak", "é"])
def test_a_tenant_that_would_garble_the_log_is_ignored(tenant: str) -> None:
    assert caller_of(context(("x-tenant", tenant)), from_gateway=False) == "10.0.0.7"


def test_name_of_a_key_comes_first() -> None:
    call = context(("x-tenant", "team-a"), peer_uri=[b"spiffe://a/b"])
    assert caller_of(call, from_gateway=False, key_name="alice") == "alice"


def test_tenant_counts_only_where_callers_need_no_key() -> None:
    call = context(("x-tenant", "team-a"))
    assert caller_of(call, from_gateway=False, takes_tenants=False) == "10.0.0.7"


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        (
            {"peer_uri": [b"spiffe://a/b"], "peer_dns": [b"c"], "x509_common_name": [b"d"]},
            "spiffe://a/b",
        ),
        ({"peer_dns": [b"c.example", b"e.example"], "x509_common_name": [b"d"]}, "c.example"),
        ({"x509_common_name": [b"d"]}, "d"),
        ({"x509_common_name": ["Zoë and\n co".encode()]}, "Zo__and__co"),
        ({"x509_common_name": [b"a" * 200]}, "a" * 128),
    ],
)
def test_certificate_of_a_direct_caller_has_its_name(
    certificate: dict[str, list[bytes]], name: str
) -> None:
    tenant = ("x-tenant", "team-a")
    assert caller_of(context(tenant, **certificate), from_gateway=False) == name


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ('Subject="CN=d";URI=spiffe://a/b;DNS=c.example;DNS=e.example', "spiffe://a/b"),
        ('Subject="CN=d";URI=;DNS=c.example;DNS=e.example', "c.example"),
        ('Subject="CN=d,O=x"', "d"),
        ('Subject="O=x,CN=d"', "d"),
        (r'Subject="O=x\\,CN=admin,CN=d"', "d"),  # the organisation is called `x,CN=admin`
        (r'Subject="CN=\"d\",O=x"', '"d"'),
        (r'Subject="CN=d;URI=spiffe://admin"', "d;URI=spiffe://admin"),
        ('Subject=""', "192.0.2.9"),
        ("", "192.0.2.9"),
    ],
)
def test_certificate_of_a_gateways_caller_has_its_name(header: str, name: str) -> None:
    forwarded = (("x-envoy-external-address", "192.0.2.9"), ("x-forwarded-client-cert", header))
    assert caller_of(context(*forwarded), from_gateway=True) == name


def test_only_the_gateway_is_believed_about_certificates() -> None:
    header = ("x-forwarded-client-cert", "URI=spiffe://a/admin")
    assert caller_of(context(header), from_gateway=False) == "10.0.0.7"


def context(*metadata: tuple[str, str | bytes], **certificate: list[bytes]) -> Any:
    """A call with this metadata, from a caller with this certificate."""
    return FakeContext(*metadata, **certificate)
