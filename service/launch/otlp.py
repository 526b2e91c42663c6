"""Where traces and metrics go: what flags and OpenTelemetry's own variables say together.

The service's SDK reads the variables itself; Envoy cannot, so both get what is found here. Nothing
of OpenTelemetry is imported.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from ..access.certificates import check_client_files
from .options import SettingsError

Protocol = Literal["grpc", "http/protobuf"]
Signal = Literal["traces", "metrics"]

DEFAULT_SERVICE_NAME = "text-generation-inference.router"  # TGI's
_DEFAULT_URLS = {"grpc": "http://localhost:4317", "http/protobuf": "http://localhost:4318"}
_DEFAULT_PORTS = {"grpc": 4317, "http": 80, "https": 443}
_SAMPLERS = ("always_on", "always_off", "traceidratio")
_PARENT_BASED = "parentbased_"


class Sampling(NamedTuple):
    """Which traces are kept: a share of them, unless the caller has decided and is followed."""

    ratio: float = 1.0
    follows_parent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A collector, and what is sent to it.

    Attributes:
        url: of the collector, for HTTP with the path that takes this signal.
        protocol: how it is spoken to.
        is_encrypted: whether over TLS.
        service_name: whose spans or metrics they are.
        headers: sent with every export. They may be secrets.
        resource: further attributes of the server, beside its name.
        ca: PEM of who signs the collector's certificate; None for whom the system trusts.
        certificate: PEM that the collector may ask for.
        key: its key.
    """

    url: str
    protocol: Protocol = "grpc"
    is_encrypted: bool = False
    service_name: str = DEFAULT_SERVICE_NAME
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    resource: tuple[tuple[str, str], ...] = ()
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @property
    def host(self) -> str:
        """The collector's name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The collector's port."""
        parts = urlsplit(self.url)
        name = "grpc" if self.protocol == "grpc" else parts.scheme
        return parts.port or _DEFAULT_PORTS[name]

    @property
    def authority(self) -> str:
        """Host and port, as HTTP/2 names them."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def is_address(self) -> bool:
        """Whether the host is an IP address."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    @property
    def options(self) -> dict[str, Any]:
        """What the SDK's exporter for this protocol is made with.

        Raises:
            OSError: a file cannot be read.
        """
        options = {"endpoint": self.url, "headers": dict(self.headers)}
        if self.protocol == "grpc":
            # By itself it would read the client's certificate only beside an authority.
            credentials = _channel_credentials(self) if self.is_encrypted else None
            return options | {"insecure": not self.is_encrypted, "credentials": credentials}
        paths = {
            "certificate_file": self.ca,
            "client_certificate_file": self.certificate,
            "client_key_file": self.key,
        }
        session = None if self.ca is None else _session()
        given = {name: str(path) for name, path in paths.items() if path is not None}
        return options | given | {"session": session}

    def check(self) -> None:
        """Checks that the files can be used.

        Raises:
            ValueError: one cannot; the text is one line that names it.
        """
        try:
            check_client_files(self.ca, self.certificate, self.key)
        except (OSError, ValueError) as error:
            raise ValueError(f"the certificates of OTEL_EXPORTER_OTLP_*: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceExport(Export):
    """A collector of traces, and which of them are kept."""

    sampling: Sampling = field(default_factory=Sampling)


def trace_export(
    endpoint: str | None, service_name: str | None, environment: Mapping[str, str]
) -> TraceExport | None:
    """Where traces go; None if there are to be none.

    Args:
        endpoint: the flag's, which wins over the variables.
        service_name: likewise.
        environment: the process's.

    Raises:
        SettingsError: an endpoint or a protocol cannot be used.
    """
    variables = _Variables(environment, "traces")
    sampling = _sampling(variables)
    if not variables.want_signal(endpoint) or sampling is None:
        return None
    return TraceExport(
        **_shared(_url(endpoint, variables), service_name, variables), sampling=sampling
    )


def metric_export(
    endpoint: str | None, service_name: str | None, environment: Mapping[str, str]
) -> Export | None:
    """Where metrics are pushed to; None if they are not.

    Args:
        endpoint: the flag's, which is about traces: metrics go there only if a variable asks for
            them and none says where to.
        service_name: the flag's, which wins over the variables.
        environment: the process's.

    Raises:
        SettingsError: an endpoint or a protocol cannot be used.
    """
    variables = _Variables(environment, "metrics")
    if not variables.want_signal(None):
        return None
    if variables.otlp("ENDPOINT"):
        endpoint = None
    return Export(**_shared(_url(endpoint, variables), service_name, variables))


class _Variables:
    """The environment, for one signal; an empty variable counts as absent."""

    def __init__(self, environment: Mapping[str, str], signal: Signal) -> None:
        self._environment = environment
        self.signal = signal

    def get(self, name: str) -> str:
        """The value, or an empty text."""
        return self._environment.get(name, "").strip()

    def own(self, name: str) -> str:
        """What a variable of OTLP is called for this signal alone."""
        return f"OTEL_EXPORTER_OTLP_{self.signal.upper()}_{name}"

    def otlp(self, name: str) -> str:
        """The value for this signal, or else that for all signals."""
        return self.get(self.own(name)) or self.get(f"OTEL_EXPORTER_OTLP_{name}")

    def want_signal(self, endpoint: str | None) -> bool:
        """Whether anything asks for this signal and nothing forbids it.

        Raises:
            SettingsError: it is to go to something else than a collector.
        """
        if self.get("OTEL_SDK_DISABLED").lower() == "true":
            return False
        name = f"OTEL_{self.signal.upper()}_EXPORTER"
        exporter = self.get(name)
        if exporter not in ("", "otlp", "none"):
            raise SettingsError(f"{name} must be otlp or none. Given: {exporter}")
        if exporter == "none":
            return False
        return bool(endpoint or self.otlp("ENDPOINT") or exporter)

    def protocol(self) -> Protocol:
        """How the collector is spoken to.

        Raises:
            SettingsError: there is no such protocol.
        """
        protocol = self.otlp("PROTOCOL") or "grpc"
        if protocol == "grpc":
            return "grpc"
        if protocol == "http/protobuf":
            return "http/protobuf"
        own = self.own("PROTOCOL")
        name = own if self.get(own) else "OTEL_EXPORTER_OTLP_PROTOCOL"
        raise SettingsError(f"{name} must be grpc or http/protobuf. Given: {protocol}")


def _shared(url: str, service_name: str | None, variables: _Variables) -> dict[str, Any]:
    """What both signals have, by the names of `Export`.

    Raises:
        SettingsError: a client's certificate lacks its key, or a key its certificate.
    """
    resource = dict(_pairs(variables.get("OTEL_RESOURCE_ATTRIBUTES")))
    named = resource.pop("service.name", "")
    headers = _pairs(variables.otlp("HEADERS"))
    certificate, key = (_path(variables.otlp(f"CLIENT_{what}")) for what in ("CERTIFICATE", "KEY"))
    if (certificate is None) != (key is None):
        raise SettingsError(
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY "
            "must be given together"
        )
    return {
        "url": url,
        "protocol": variables.protocol(),
        "is_encrypted": url.startswith("https:"),
        "service_name": (
            service_name or variables.get("OTEL_SERVICE_NAME") or named or DEFAULT_SERVICE_NAME
        ),
        "headers": tuple((key.lower(), text) for key, text in headers),
        "resource": tuple(resource.items()),
        "ca": _path(variables.otlp("CERTIFICATE")),
        "certificate": certificate,
        "key": key,
    }


def _url(endpoint: str | None, variables: _Variables) -> str:
    """The collector's URL.

    Raises:
        SettingsError: it is none.
    """
    protocol, name = variables.protocol(), variables.own("ENDPOINT")
    if endpoint is None and (own := variables.get(name)):
        return _checked(own, name, protocol, variables)
    shared, source = variables.get("OTEL_EXPORTER_OTLP_ENDPOINT"), "OTEL_EXPORTER_OTLP_ENDPOINT"
    if endpoint is not None:
        shared, source = endpoint, "`otlp_endpoint`"
    url = _checked(shared or _DEFAULT_URLS[protocol], source, protocol, variables)
    path = f"/v1/{variables.signal}"  # below the endpoint of all signals
    if protocol == "grpc" or urlsplit(url).path.endswith(path):
        return url
    return url.rstrip("/").removesuffix("/v1/traces") + path


def _checked(raw: str, source: str, protocol: Protocol, variables: _Variables) -> str:
    """A URL; over gRPC a host and a port are enough.

    Raises:
        SettingsError: it is none.
    """
    url = raw.strip()
    if "://" not in url and protocol == "grpc":
        is_plain = variables.otlp("INSECURE").lower() == "true"
        url = f"{'http' if is_plain else 'https'}://{url}"
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or not url.isprintable() or " " in url:
        raise SettingsError(f"{source} must be a URL such as http://collector:4317. Given: {raw}")
    return url


def _sampling(variables: _Variables) -> Sampling | None:
    """Which traces are kept; None for none. Unknown names count as absent, as in the SDK."""
    name = variables.get("OTEL_TRACES_SAMPLER").lower() or f"{_PARENT_BASED}always_on"
    follows_parent = name.startswith(_PARENT_BASED)
    kind = name.removeprefix(_PARENT_BASED)
    if kind not in _SAMPLERS:
        return Sampling()
    if kind == "always_off":
        return Sampling(0.0) if follows_parent else None
    ratio = _ratio(variables.get("OTEL_TRACES_SAMPLER_ARG")) if kind == "traceidratio" else 1.0
    return Sampling(ratio, follows_parent)


def _ratio(raw: str) -> float:
    try:
        ratio = float(raw)
    except ValueError:
        return 1.0
    return ratio if 0 <= ratio <= 1 else 1.0


def _pairs(raw: str) -> list[tuple[str, str]]:
    """Parts like `name=value`, percent-encoded, between commas; what is none is left out."""
    pairs = (part.partition("=") for part in raw.split(","))
    return [
        (unquote(name).strip(), unquote(value).strip())
        for name, sep, value in pairs
        if sep and name
    ]


def _channel_credentials(export: Export) -> Any:
    import grpc  # here, because the commands that only check settings need no gRPC

    ca, key, certificate = (
        None if path is None else path.read_bytes()
        for path in (export.ca, export.key, export.certificate)
    )
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _session() -> Any:
    """What connects for HTTP, and believes those alone whom it is told to.

    By itself it would believe those in REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE instead.
    """
    import requests

    session = requests.Session()
    session.trust_env = False
    return session


def _path(raw: str) -> Path | None:
    return Path(raw).absolute() if raw else None
