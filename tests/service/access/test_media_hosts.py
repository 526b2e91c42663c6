"""Which hosts an operator's list names."""

from __future__ import annotations

import pytest

from service.access.media_hosts import MediaHosts


@pytest.mark.parametrize(
    ("entry", "places"),
    [
        ("example.com", {("example.com", 80), ("example.com", 443)}),
        ("Img.Example.COM:8443", {("img.example.com", 8443)}),
        ("10.0.0.7", {("10.0.0.7", 80), ("10.0.0.7", 443)}),
        ("[fd00::7]:8080", {("fd00::7", 8080)}),
        ("[::1]", {("::1", 80), ("::1", 443)}),
        ("localhost:9000", {("localhost", 9000)}),
    ],
)
def test_an_entry_is_a_host_with_its_ports(entry: str, places: set[tuple[str, int]]) -> None:
    assert MediaHosts.of([entry]).places == places


def test_other_hosts_and_ports_are_not_in_a_list() -> None:
    hosts = MediaHosts.of(["example.com", "b.example.com:81"])
    assert ("b.example.com", 81) in hosts
    for other in [("a.example.com", 443), ("example.com.evil.net", 443), ("example.com", 22)]:
        assert other not in hosts


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.example.com", "https://example.com", "example.com/x", "a b", "::1", "a:0",
     "a:65536", "a:b", "user@example.com", ".example.com", "example.com.", "bücher.example"],
)  # fmt: skip
def test_entries_of_another_form_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="an entry must have the form"):
        MediaHosts.of([entry])
