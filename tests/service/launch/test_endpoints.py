"""The file of addresses: read strictly, and kept for Envoy as it was when it is broken."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from service.launch import endpoints
from service.launch.endpoints import follow_endpoints, read_endpoints, write_endpoints
from service.launch.servers import Address
from tests.envoy.gateway import poll


def test_a_line_is_an_address_or_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "servers"
    path.write_text("# all of them\n\n10.0.0.1:1 # first\r\n  [::1]:2\n")
    assert read_endpoints(path) == (Address("10.0.0.1", 1), Address("::1", 2))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no address"),
        (b"# nothing\n", "has no address"),
        (b"10.0.0.1\n", "not an address host:port: '10.0.0.1'"),
        (b"10.0.0.1:1 10.0.0.2:1\n", "not an address host:port"),
        (b"10.0.0.1:1\n10.0.0.1:1\n", "more than once"),
        (b"gpu.internal:1\n", "is not an IP address with a port"),
        (b"\xff\xfe\n", "can't decode"),
        (b"#" * ((1 << 20) + 1), "more than 1048576 bytes"),
    ],
)
def test_another_file_is_an_error_of_one_line(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "servers"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_endpoints(path)
    assert "\n" not in str(caught.value)


def ports(target: Path) -> list[int]:
    """The ports that Envoy reads."""
    (resource,) = json.loads(target.read_text())["resources"]
    (locality,) = resource["endpoints"]
    addresses: list[Any] = [it["endpoint"]["address"] for it in locality["lb_endpoints"]]
    return [it["socket_address"]["port_value"] for it in addresses]


async def test_envoys_file_follows_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoints, "_POLL_S", 0.001)
    path, target = tmp_path / "servers", tmp_path / "servers.json"
    path.write_text("10.0.0.1:1\n")

    async def until(expected: list[int]) -> None:
        reached = lambda: target.exists() and ports(target) == expected  # noqa: E731
        await asyncio.to_thread(poll, reached, f"the addresses are {expected}")

    following = asyncio.create_task(follow_endpoints(path, target))
    await until([1])
    path.write_text("10.0.0.1:1\n10.0.0.2:22\n")
    await until([1, 22])
    path.unlink()
    await asyncio.to_thread(poll, lambda: "cannot be used" in caplog.text, "a word about it")
    assert ports(target) == [1, 22]
    path.write_text("10.0.0.3:333\n")
    await until([333])
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following


def test_envoy_never_sees_a_file_that_is_half_written(tmp_path: Path) -> None:
    target = tmp_path / "servers.json"
    write_endpoints((Address("10.0.0.1", 1),), target)
    inode = target.stat().st_ino
    write_endpoints((Address("10.0.0.2", 2),), target)
    assert target.stat().st_ino != inode
    assert ports(target) == [2]
