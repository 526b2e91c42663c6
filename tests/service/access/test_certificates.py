"""Certificates: what is refused at the start, in words, and connections that use them."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from service.access.certificates import TlsFiles, server_credentials
from tests.certificates import Authority, Pair
from tests.service.fakes import TIMEOUT_S


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(authority: Authority, request: pytest.FixtureRequest) -> Pair:
    return authority.issue(request.node.name.partition("[")[0], "DNS:localhost")


def test_right_files_are_accepted(authority: Authority, server: Pair) -> None:
    TlsFiles(server.certificate, server.key, authority.certificate).check()


def test_files_that_do_not_belong_together_are_refused(authority: Authority, server: Pair) -> None:
    other = authority.issue("other")
    with pytest.raises(ValueError, match=r"certificate.pem and .*key.pem: key values mismatch"):
        TlsFiles(server.certificate, other.key).check()


@pytest.mark.parametrize("which", ["certificate", "key", "client_ca"])
@pytest.mark.parametrize("content", [None, "no certificate\n"])
def test_missing_and_broken_files_are_named(
    authority: Authority, server: Pair, tmp_path: Path, which: str, content: str | None
) -> None:
    bad = tmp_path / "bad.pem"
    if content is not None:
        bad.write_text(content)
    files: dict[str, Any] = {
        "certificate": server.certificate,
        "key": server.key,
        "client_ca": authority.certificate,
    }
    error = OSError if content is None else ValueError
    with pytest.raises(error, match=r"bad\.pem") as failed:
        TlsFiles(**(files | {which: bad})).check()
    assert "\n" not in str(failed.value)


def test_key_with_a_password_is_refused(server: Pair, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", server.key, "-out", locked],
        check=True,
        capture_output=True,
    )
    with pytest.raises(ValueError, match=r"locked\.pem: has a password"):
        TlsFiles(server.certificate, locked).check()


@asynccontextmanager
async def listening(files: TlsFiles) -> AsyncGenerator[int]:
    """A gRPC server that answers with the name in the caller's certificate; gives its port."""

    async def name(_: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        return b",".join(context.auth_context().get("x509_common_name", [b"nobody"]))

    server = aio.server()
    handler = grpc.unary_unary_rpc_method_handler(name)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def ask(port: int, authority: Authority, client: Pair | None = None) -> bytes:
    """The answer on a new connection."""
    own = () if client is None else (client.key.read_bytes(), client.certificate.read_bytes())
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *own)
    # A pool of its own, because another channel to the same address would share the connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with aio.secure_channel(f"localhost:{port}", credentials, options) as channel:
        reply: bytes = await channel.unary_unary("/a.B/C")(b"", timeout=TIMEOUT_S)
        return reply


async def test_caller_needs_a_certificate_only_where_it_is_asked_for_one(
    authority: Authority, server: Pair
) -> None:
    client = authority.issue("client")
    async with listening(TlsFiles(server.certificate, server.key)) as port:
        assert await ask(port, authority) == b"nobody"
    mutual = TlsFiles(server.certificate, server.key, authority.certificate)
    async with listening(mutual) as port:
        assert await ask(port, authority, client) == b"client"
        with pytest.raises(aio.AioRpcError):
            await ask(port, authority)


async def test_certificate_of_a_stranger_is_refused(
    authority: Authority, server: Pair, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path).issue("client")
    mutual = TlsFiles(server.certificate, server.key, authority.certificate)
    async with listening(mutual) as port:
        with pytest.raises(aio.AioRpcError):
            await ask(port, authority, stranger)


async def test_new_certificate_is_used_without_a_restart(
    authority: Authority, server: Pair, tmp_path: Path
) -> None:
    """The new one is another authority's, so a client tells which of them it was shown."""
    others = Authority(tmp_path)
    async with listening(TlsFiles(server.certificate, server.key)) as port:
        assert await ask(port, authority) == b"nobody"
        server.replace_by(others.issue("new", "DNS:localhost"))
        assert await ask(port, others) == b"nobody"
        with pytest.raises(aio.AioRpcError):
            await ask(port, authority)


async def test_broken_certificate_changes_nothing(
    authority: Authority, server: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(TlsFiles(server.certificate, server.key)) as port:
        server.certificate.write_text("broken")
        assert await ask(port, authority) == b"nobody"
    assert "the certificates of the gRPC port changed and cannot be used" in caplog.text
