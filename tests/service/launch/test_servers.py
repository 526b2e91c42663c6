"""Addresses of servers, and what of a request decides between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.launch.servers import Address, Servers, parse_address, parse_addresses


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:50052", "10.0.0.1", 50052),
        (" [2001:db8::1]:1 ", "2001:db8::1", 1),
        ("tokenwire-gateways:65535", "tokenwire-gateways", 65535),
        ("a.b-c.example.:8", "a.b-c.example.", 8),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)
    assert str(parse_address(text)) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "", "host", "host:", ":1", "host:0", "host:65536", "host:x", "host:1:2", "::1:5", "[::1]",
        "[host]:1", "[10.0.0.1]:1", "10.0.0.300:1", "1.2.3:4", "-a:1", "a..b:1", "a b:1",
        "http://a:1", "a/b:1", 'a":1', "a" * 64 + ":1",
    ],
)  # fmt: skip
def test_everything_else_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an address|neither an IP address"):
        parse_address(text)


def test_no_address_is_there_twice() -> None:
    with pytest.raises(ValueError, match=r"\[::1\]:2 is there more than once"):
        parse_addresses(["a:1", "[::1]:2", "[::1]:2"])
    assert len(parse_addresses(["a:1", "a:2"])) == 2


def servers(*texts: str, path: Path | None = None) -> Servers:
    return Servers(addresses=parse_addresses(texts), endpoints_file=path)


def test_one_address_is_one_server_unless_it_may_become_more() -> None:
    assert not servers("10.0.0.1:1").may_be_several
    assert servers("10.0.0.1:1", "10.0.0.2:1").may_be_several
    assert servers("name:1").may_be_several
    assert servers("10.0.0.1:1", path=Path("x")).may_be_several


def test_headers_are_looked_at_in_the_order_of_the_setting() -> None:
    def headers(*affinity: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        found = Servers(addresses=(), affinity=affinity)  # type: ignore[arg-type]
        return found.hashed_headers, found.preceding_headers

    assert headers() == ((), None)
    assert headers("session") == (("x-session-id",), None)
    hashed, preceding = headers("session", "caller", "beginning")
    assert hashed[:-1] == preceding == ("x-session-id", "authorization", "x-api-key")
    assert headers("beginning", "session")[1] == ()
