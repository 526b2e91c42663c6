"""Names are connected to by addresses that were checked, which must be public."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from httpcore2 import AsyncMockStream, AsyncNetworkStream, ConnectError

from service.images.public_network import HostError, Names, PublicNetwork, is_public

PUBLIC = ("93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07::1", "64:ff9b::808:808")
NOT_PUBLIC = (
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.2.1", "198.18.0.1", "224.0.0.1",
    "239.1.2.3", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::a00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::808:808", "2002:7f00:1::1", "2001:0:808:808::1", "2001:db8::1", "100::1", "4000::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


class Recorder:
    """Stands for the network: remembers what was connected to; some addresses do not answer."""

    def __init__(self, *silent: str) -> None:
        self.connected: list[str] = []
        self._silent = silent

    async def connect_tcp(self, host: str, *_: Any) -> AsyncNetworkStream:
        self.connected.append(host)
        if host in self._silent:
            raise ConnectError
        return AsyncMockStream([])


def network(
    answers: Iterable[list[str]], *silent: str
) -> tuple[PublicNetwork, Recorder, list[str]]:
    """A network on which a name has other addresses each time it is asked for."""
    asked, left = list[str](), iter(answers)

    async def resolve(host: str, _: int) -> list[str]:
        asked.append(host)
        return next(left)

    made, recorder = PublicNetwork(resolve), Recorder(*silent)
    vars(made)["_network"] = recorder
    return made, recorder, asked


async def test_the_address_that_was_checked_is_connected_to() -> None:
    """A name may have another address when it is asked for again."""
    made, recorder, asked = network([["8.8.8.8"], ["127.0.0.1"]])
    await made.connect_tcp("images.example", 443)
    assert (recorder.connected, asked) == (["8.8.8.8"], ["images.example"])


async def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    made, recorder, _ = network([["2606:2800:21f:cb07::1", "8.8.8.8"]], "2606:2800:21f:cb07::1")
    await made.connect_tcp("images.example", 443)
    assert recorder.connected == ["2606:2800:21f:cb07::1", "8.8.8.8"]


@pytest.mark.parametrize(
    "found", [[], ["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:10.0.0.1"], ["169.254.169.254"]]
)
async def test_a_name_with_an_address_that_is_not_public_is_refused(found: list[str]) -> None:
    made, recorder, _ = network([found])
    with pytest.raises(HostError, match="not public"):
        await made.connect_tcp("images.example", 80)
    assert recorder.connected == []


async def test_addresses_mean_themselves() -> None:
    made, recorder, asked = network([])
    for address in ("127.0.0.1", "fd00::7"):
        await made.connect_tcp(address, 80)
    assert (recorder.connected, asked) == (["127.0.0.1", "fd00::7"], [])


@pytest.mark.parametrize(("found", "is_taken"), [("127.0.0.1", True), ("8.8.8.8", False)])
async def test_localhost_is_this_machine(found: str, is_taken: bool) -> None:
    made, recorder, _ = network([[found]])
    if is_taken:
        await made.connect_tcp("localhost", 80)
        assert recorder.connected == [found]
    else:
        with pytest.raises(HostError):
            await made.connect_tcp("localhost", 80)


async def test_a_name_that_nobody_knows_is_refused() -> None:
    async def resolve(_: str, __: int) -> list[str]:
        raise OSError

    with pytest.raises(HostError, match="not known"):
        await PublicNetwork(resolve).connect_tcp("images.example", 80)


async def test_the_system_knows_this_machine() -> None:
    ask: Callable[..., Any] = Names()
    assert set(await ask("localhost", 80)) <= {"127.0.0.1", "::1"}
