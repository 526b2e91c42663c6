"""Envoy is told of new certificates, and only of those that it can use."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.access.certificates import TlsFiles
from service.launch import certificates
from service.launch.certificates import follow_certificates
from tests.certificates import Authority
from tests.service.fakes import eventually


class Mark:
    """What is moved into the directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / "certificates-changed"

    def is_there(self) -> bool:
        return self._path.exists()

    def remove(self) -> None:
        self._path.unlink()


@pytest.fixture
def mark(tmp_path: Path) -> Mark:
    directory = tmp_path / "watched"
    directory.mkdir()
    return Mark(directory)


async def test_usable_certificates_are_told_of_and_others_are_not(
    tmp_path: Path,
    mark: Mark,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(certificates, "_POLL_S", 0.001)
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    following = asyncio.create_task(
        follow_certificates(TlsFiles(pair.certificate, pair.key), mark.directory)
    )
    await eventually(mark.is_there)  # once at the start, before Envoy is there
    mark.remove()
    old = pair.certificate.read_text()
    pair.certificate.write_text("broken")
    await eventually(lambda: "cannot be used, the old ones stay" in caplog.text)
    assert not mark.is_there()
    pair.certificate.write_text(old)
    await eventually(mark.is_there)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
