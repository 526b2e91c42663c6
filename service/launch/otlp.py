"""Where traces go and which: what flags and OpenTelemetry's own variables say together.

The service's SDK reads the variables itself; Envoy cannot, so both get what is found here. Nothing
of OpenTelemetry is imported.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from .options import SettingsError

Protocol = Literal["grpc", "http/protobuf"]

DEFAULT_SERVICE_NAME = "text-generation-inference.router"  # TGI's
_DEFAULT_URLS = {"grpc": "http://localhost:4317", "http/protobuf": "http://localhost:4318"}
_TRACES_PATH = "/v1/traces"  # below the endpoint of all signals
_DEFAULT_PORTS = {"grpc": 4317, "http": 80, "https": 443}
_SAMPLERS = ("always_on", "always_off", "traceidratio")
_PARENT_BASED = "parentbased_"


class Sampling(NamedTuple):
    """Which traces are kept: a share of them, unless the caller has decided and is followed."""

    ratio: float = 1.0
    follows_parent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceExport:
    """A collector of traces, and what is sent to it.

    Attributes:
        url: of the collector, for HTTP with the path that takes traces.
        protocol: how it is spoken to.
        is_encrypted: whether over TLS.
        service_name: whose spans they are.
        sampling: which traces are kept.
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
    sampling: Sampling = field(default_factory=Sampling)
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
    variables = _Variables(environment)
    sampling = _sampling(variables)
    if not _is_wanted(endpoint, variables) or sampling is None:
        return None
    protocol = _protocol(variables)
    url = _url(endpoint, protocol, variables)
    resource = dict(_pairs(variables.get("OTEL_RESOURCE_ATTRIBUTES")))
    named = resource.pop("service.name", "")
    return TraceExport(
        url=url,
        protocol=protocol,
        is_encrypted=url.startswith("https:"),
        service_name=(
            service_name or variables.get("OTEL_SERVICE_NAME") or named or DEFAULT_SERVICE_NAME
        ),
        sampling=sampling,
        headers=tuple((key.lower(), text) for key, text in _pairs(variables.otlp("HEADERS"))),
        resource=tuple(resource.items()),
        ca=_path(variables.otlp("CERTIFICATE")),
        certificate=_path(variables.otlp("CLIENT_CERTIFICATE")),
        key=_path(variables.otlp("CLIENT_KEY")),
    )


class _Variables:
    """The environment; an empty variable counts as absent."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def get(self, name: str) -> str:
        """The value, or an empty text."""
        return self._environment.get(name, "").strip()

    def otlp(self, name: str) -> str:
        """The value for traces, or else that for all signals."""
        return self.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or self.get(
            f"OTEL_EXPORTER_OTLP_{name}"
        )


def _is_wanted(endpoint: str | None, variables: _Variables) -> bool:
    """Whether anything asks for traces and nothing forbids them.

    Raises:
        SettingsError: they are to go to something else than a collector.
    """
    if variables.get("OTEL_SDK_DISABLED").lower() == "true":
        return False
    exporter = variables.get("OTEL_TRACES_EXPORTER")
    if exporter not in ("", "otlp", "none"):
        raise SettingsError(f"OTEL_TRACES_EXPORTER must be otlp or none. Given: {exporter}")
    if exporter == "none":
        return False
    return bool(endpoint or variables.otlp("ENDPOINT") or exporter)


def _protocol(variables: _Variables) -> Protocol:
    protocol = variables.otlp("PROTOCOL") or "grpc"
    if protocol == "grpc":
        return "grpc"
    if protocol == "http/protobuf":
        return "http/protobuf"
    raise SettingsError(
        f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf. Given: {protocol}"
    )


def _url(endpoint: str | None, protocol: Protocol, variables: _Variables) -> str:
    """The collector's URL.

    Raises:
        SettingsError: it is none.
    """
    own = variables.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if endpoint is None and own:
        return _checked(own, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", protocol, variables)
    shared, source = variables.get("OTEL_EXPORTER_OTLP_ENDPOINT"), "OTEL_EXPORTER_OTLP_ENDPOINT"
    if endpoint is not None:
        shared, source = endpoint, "`otlp_endpoint`"
    url = _checked(shared or _DEFAULT_URLS[protocol], source, protocol, variables)
    if protocol == "grpc" or urlsplit(url).path.endswith(_TRACES_PATH):
        return url
    return url.rstrip("/") + _TRACES_PATH


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


def _path(raw: str) -> Path | None:
    return Path(raw).absolute() if raw else None
