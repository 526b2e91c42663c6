"""TLS on the public port: REST and gRPC, callers with certificates, certificates that change."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from service.access.certificates import TlsFiles
from service.launch import gateway as gateway_module
from tests.certificates import Authority, Pair
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway, StartGateway, poll

XFCC = "x-forwarded-client-cert"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs all certificates."""
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    """The gateway's certificate."""
    return authority.issue("server", "DNS:localhost")


@pytest.fixture(scope="module")
def tls_gateway(
    start_gateway: StartGateway, authority: Authority, server: Pair
) -> Iterator[Gateway]:
    """A gateway whose certificate may change."""
    tls = TlsFiles(server.certificate, server.key)
    with start_gateway(trusting(authority), tls=tls) as running:
        running.wait_until_healthy()
        yield running


@pytest.fixture(scope="module")
def mutual_gateway(start_gateway: StartGateway, authority: Authority) -> Iterator[Gateway]:
    """A gateway whose callers need a certificate; its client has one that names a URI."""
    server = authority.issue("mutual", "DNS:localhost")
    tls = TlsFiles(server.certificate, server.key, authority.certificate)
    client = authority.issue("client", "DNS:client.example", "URI:spiffe://example/client")
    context = trusting(authority, client)
    with start_gateway(context, tls=tls) as running:
        running.wait_until_healthy()
        yield running


def trusting(authority: Authority, client: Pair | None = None) -> ssl.SSLContext:
    """What a client of HTTP believes, and the certificate that it has."""
    context = ssl.create_default_context(cafile=authority.certificate)
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


def channel(gateway: Gateway, authority: Authority, client: Pair | None = None) -> grpc.Channel:
    """The same for gRPC."""
    own = () if client is None else (client.key.read_bytes(), client.certificate.read_bytes())
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *own)
    return grpc.secure_channel(gateway.target, credentials)


def info(gateway: Gateway, channel: grpc.Channel, **keywords: Any) -> Any:
    """A call to Info."""
    request = gateway.messages.new("InfoRequest")
    return gateway.stub(channel, "Info")(request, timeout=DEADLINE, **keywords)


def serial(gateway: Gateway, authority: Authority) -> str:
    """The number of the certificate that the gateway shows on a new connection."""
    host, _, port = gateway.target.partition(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        trusting(authority).wrap_socket(plain, server_hostname=host) as secured,
    ):
        shown: Any = secured.getpeercert()
        return str(shown["serialNumber"])


def test_rest_and_grpc_are_served(tls_gateway: Gateway, authority: Authority) -> None:
    assert tls_gateway.client.get("/info").content == b'{"method":"Info"}'
    with channel(tls_gateway, authority) as secured:
        assert info(tls_gateway, secured).http.data == b'{"method":"Info"}'


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
def test_client_chooses_the_version_of_http(
    tls_gateway: Gateway, authority: Authority, protocol: str
) -> None:
    context = trusting(authority)
    context.set_alpn_protocols([protocol])
    host, _, port = tls_gateway.target.partition(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        assert secured.selected_alpn_protocol() == protocol


def test_plain_text_is_not_answered(tls_gateway: Gateway) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{tls_gateway.target}/info", trust_env=False)


def test_caller_without_a_certificate_is_refused(
    mutual_gateway: Gateway, authority: Authority
) -> None:
    with (
        httpx.Client(verify=trusting(authority), trust_env=False) as client,
        pytest.raises(httpx.TransportError),
    ):
        client.get(f"https://{mutual_gateway.target}/info")
    with channel(mutual_gateway, authority) as anonymous, pytest.raises(grpc.RpcError) as failed:
        info(mutual_gateway, anonymous)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_caller_with_a_strangers_certificate_is_refused(
    mutual_gateway: Gateway, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path).issue("client", "URI:spiffe://example/client")
    with (
        httpx.Client(verify=trusting(authority, stranger), trust_env=False) as client,
        pytest.raises(httpx.TransportError),
    ):
        client.get(f"https://{mutual_gateway.target}/info")


def test_service_learns_the_name_in_a_certificate(mutual_gateway: Gateway) -> None:
    mutual_gateway.service.reset()
    forged = {XFCC: "URI=spiffe://example/admin"}
    assert mutual_gateway.client.get("/info", headers=forged).status_code == 200
    (call,) = [call for call in mutual_gateway.service.calls if call.method == "Info"]
    said = call.metadata[XFCC]
    assert "URI=spiffe://example/client" in said
    assert 'Subject="CN=client"' in said
    assert "admin" not in said


def test_nobody_else_can_name_a_certificate(gateway: Gateway, tls_gateway: Gateway) -> None:
    for running in (gateway, tls_gateway):
        running.service.reset()
        running.client.get("/info", headers={XFCC: "URI=spiffe://example/admin"})
        (call,) = [call for call in running.service.calls if call.method == "Info"]
        assert XFCC not in call.metadata


def moved(old: Pair, new: Pair) -> None:
    """As most tools replace certificates: each file at once."""
    old.replace_by(new)


def relinked(old: Pair, new: Pair) -> None:
    """As Kubernetes does: `old` are links into a directory, whose link is replaced."""
    directory = old.certificate.parent
    link = directory / "..new"
    link.symlink_to(new.certificate.parent)
    link.rename(directory / "..data")


@pytest.mark.parametrize("replace", [moved, relinked])
def test_new_certificate_is_shown_without_a_restart(
    start_gateway: StartGateway,
    authority: Authority,
    tmp_path: Path,
    replace: Callable[[Pair, Pair], None],
) -> None:
    first = authority.issue(f"{replace.__name__}-1", "DNS:localhost")
    second = authority.issue(f"{replace.__name__}-2", "DNS:localhost")
    (tmp_path / "..data").symlink_to(first.certificate.parent)
    old = first if replace is moved else Pair(tmp_path / "certificate.pem", tmp_path / "key.pem")
    if replace is relinked:
        for path in (old.certificate, old.key):
            path.symlink_to(Path("..data") / path.name)
    tls = TlsFiles(old.certificate, old.key)
    with start_gateway(trusting(authority), tls=tls) as running:
        running.wait_until_healthy()
        before = serial(running, authority)
        replace(old, second)
        poll(lambda: serial(running, authority) != before, "another certificate")
        assert running.client.get("/info").status_code == 200


def test_broken_certificate_changes_nothing(
    tls_gateway: Gateway, authority: Authority, server: Pair, tmp_path: Path
) -> None:
    before = serial(tls_gateway, authority)
    broken, third = Pair(tmp_path / "c", tmp_path / "k"), authority.issue("third", "DNS:localhost")
    for path in (broken.certificate, broken.key):
        path.write_text("no certificate")
    server.replace_by(broken)
    assert serial(tls_gateway, authority) == before
    server.replace_by(third)  # and it still looks for better ones
    poll(lambda: serial(tls_gateway, authority) != before, "another certificate")


def test_one_directory_of_files_is_watched_as_a_whole(tmp_path: Path) -> None:
    together = TlsFiles(tmp_path / "c", tmp_path / "k")
    apart = TlsFiles(tmp_path / "a" / "c", tmp_path / "b" / "k")
    (watching,) = gateway_module._secrets(together, None).values()
    (alone,) = gateway_module._secrets(apart, None).values()
    assert "watched_directory" in watching
    assert "watched_directory" not in alone
