"""A server with certificates on both ports: callers with one, without one, and new ones."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from service.access.keys import key_line, make_key
from tests.certificates import Authority, Pair
from tests.e2e.stack import DEADLINE_S, SERVICE, Stack, run_to_end, running, wait_until
from tests.e2e.test_bench import SIZES, result, run_bench

BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 2}}
INFO = f"/{SERVICE}/Info"


@dataclass(frozen=True)
class Secured:
    """A server, whose certificate is the same on both ports, and a caller's certificate."""

    stack: Stack
    authority: Authority
    server: Pair
    client: Pair

    def http(self, client: Pair | None) -> httpx.Client:
        return httpx.Client(
            base_url=self.stack.url,
            verify=trusting(self.authority, client),
            timeout=DEADLINE_S,
            trust_env=False,
        )

    def info(self, address: str, client: Pair | None, **metadata: str) -> Any:
        """A call to Info on a new connection."""
        own = () if client is None else (client.key.read_bytes(), client.certificate.read_bytes())
        credentials = grpc.ssl_channel_credentials(self.authority.certificate.read_bytes(), *own)
        options = [("grpc.use_local_subchannel_pool", 1)]
        pairs = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
        with grpc.secure_channel(address, credentials, options) as channel:
            return channel.unary_unary(INFO)(b"", timeout=DEADLINE_S, metadata=pairs)

    def serial(self, address: str) -> str:
        """The number of the certificate that a port shows."""
        host, _, port = address.partition(":")
        context = trusting(self.authority, self.client)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port))) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            assert secured.selected_alpn_protocol() == "h2"
            shown: Any = secured.getpeercert()
            return str(shown["serialNumber"])


def trusting(authority: Authority, client: Pair | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.certificate)
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


def issue(authority: Authority, name: str) -> Pair:
    """A server's certificate."""
    return authority.issue(name, "IP:127.0.0.1", "DNS:localhost")


def flags(server: Pair, client_ca: Path | None = None) -> list[str]:
    pairs = [("cert", server.certificate), ("key", server.key)]
    pairs += [] if client_ca is None else [("client-ca", client_ca)]
    return [f"--{port}tls-{name}={path}" for port in ("", "grpc-") for name, path in pairs]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Callers need a certificate."""
    directory = tmp_path_factory.mktemp("secured")
    authority = Authority(directory)
    server = issue(authority, "server")
    client = authority.issue("client", "URI:spiffe://example/team-a")
    options = flags(server, authority.certificate)
    with running(directory / "log", *options, "--json-output") as stack:
        yield Secured(stack, authority, server, client)


@pytest.fixture(params=["grpc_address", "address"], ids=["direct", "through_envoy"])
def address(secured: Secured, request: pytest.FixtureRequest) -> str:
    found: str = getattr(secured.stack, request.param)
    return found


def test_caller_with_a_certificate_is_served_and_named(secured: Secured) -> None:
    with secured.http(secured.client) as client:
        reply = client.post("/generate", json=BODY, headers={"x-request-id": "by-rest"})
    assert reply.status_code == 200
    assert secured.info(secured.stack.address, secured.client, x_request_id="by-envoy")
    assert secured.info(secured.stack.grpc_address, secured.client, x_request_id="by-grpc")
    for request_id in ("by-rest", "by-envoy", "by-grpc"):
        assert caller_of(secured.stack, request_id) == "spiffe://example/team-a"


def caller_of(stack: Stack, request_id: str) -> str:
    """The caller's name in the access log."""

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in stack.log().splitlines() if line.startswith("{")]
        return [line for line in found if line.get("request_id") == request_id]

    wait_until(lambda: bool(lines()), f"a line about {request_id}")
    return str(lines()[0]["caller"])


def test_grpc_without_a_certificate_is_refused(secured: Secured, address: str) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        secured.info(address, None)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_grpc_in_plain_text_is_refused(address: str) -> None:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(INFO)(b"", timeout=DEADLINE_S)


def test_rest_without_a_certificate_is_refused(secured: Secured) -> None:
    with secured.http(None) as client, pytest.raises(httpx.TransportError):
        client.get("/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{secured.stack.address}/health", trust_env=False)


def test_certificate_of_another_authority_is_refused(
    secured: Secured, address: str, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path).issue("client", "URI:spiffe://example/team-a")
    with pytest.raises(grpc.RpcError):
        secured.info(address, stranger)
    with secured.http(stranger) as client, pytest.raises(httpx.TransportError):
        client.get("/health")


def moved(old: Pair, new: Pair) -> None:
    old.replace_by(new)


def written_again(old: Pair, new: Pair) -> None:
    """The files stay, and what is in them changes."""
    shutil.copyfile(new.certificate, old.certificate)
    shutil.copyfile(new.key, old.key)


def linked_anew(old: Pair, new: Pair) -> None:
    """As certbot does: the old link is removed first."""
    for mine, others in ((old.certificate, new.certificate), (old.key, new.key)):
        mine.unlink()
        mine.symlink_to(others)


@pytest.mark.parametrize("replace", [moved, written_again, linked_anew])
def test_new_certificate_is_shown_while_a_stream_goes_on(
    secured: Secured, address: str, replace: Callable[[Pair, Pair], None]
) -> None:
    before = secured.serial(address)
    with secured.http(secured.client) as client:
        request = BODY | {"parameters": {"max_new_tokens": 20}}
        with client.stream("POST", "/generate_stream", json=request) as reply:
            replace(secured.server, issue(secured.authority, f"next-{before}"))
            wait_until(lambda: secured.serial(address) != before, "another certificate")
            assert "generated_text" in reply.read().decode()
    assert secured.info(address, secured.client)


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_bench_connects_with_a_certificate(secured: Secured, transport: str) -> None:
    target = {"rest": secured.stack.url, "grpc": f"grpcs://{secured.stack.grpc_address}"}[transport]
    files = [f"--tls-ca={secured.authority.certificate}"]
    files += [f"--tls-cert={secured.client.certificate}", f"--tls-key={secured.client.key}"]
    assert result(run_bench(f"--target={target}", *files, *SIZES, "--json"))["failed"] == 0
    refused = run_bench(f"--target={target}", files[0], *SIZES)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_keys_without_exemptions_and_tls_go_together(tmp_path: Path) -> None:
    """The server becomes ready, though nobody may ask for its health without a key."""
    authority, key = Authority(tmp_path), make_key()
    server, file = issue(authority, "server"), tmp_path / "keys"
    file.write_text(key_line("alice", key))
    options = [*flags(server), f"--api-key-file={file}", "--api-key-exempt=none"]
    with running(tmp_path / "log", *options) as stack:
        secured = Secured(stack, authority, server, server)
        allowed = {"authorization": f"Bearer {key}"}
        with secured.http(None) as client:
            assert client.get("/health").status_code == 401
            assert client.get("/health", headers=allowed).status_code == 200
            assert client.post("/generate", json=BODY, headers=allowed).status_code == 200
        with pytest.raises(grpc.RpcError) as failed:
            secured.info(stack.grpc_address, None)
        assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        assert secured.info(stack.grpc_address, None, **allowed)
        bench = (f"--target={stack.url}", f"--tls-ca={authority.certificate}", *SIZES, "--json")
        assert result(run_bench(*bench, f"--api-key={key}"))["failed"] == 0


@pytest.mark.parametrize("option", ["--api-key-file", "--tls-cert", "--grpc-tls-cert"])
def test_unusable_files_are_one_line_at_the_start(tmp_path: Path, option: str) -> None:
    missing = tmp_path / "missing"
    key = [option.replace("cert", "key") + f"={missing}"] if "tls" in option else []
    ended = run_to_end(f"{option}={missing}", *key)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"tokenwire serve: {option}")
    assert line.endswith("/missing: No such file or directory")
