"""What a server is started with: every option once, with its default, its bounds and its help."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from engine.protocol.adapters import MAX_NAME, has_control_characters, same_name
from engine.protocol.config import GRAPH_SIZES, EngineConfig
from engine.protocol.processors import num_processors

from ..access.certificates import TlsFiles
from ..access.media_hosts import MediaHosts
from ..bundled import demo_model
from ..checkpoint.path import resolve
from .endpoints import read_endpoints
from .gateway import GatewayConfig
from .options import About, Option, SettingsError, flag, is_ip_address, spell
from .otlp import Export, TraceExport, metric_export, trace_export
from .servers import Address, Affinity, Servers, parse_addresses

Dtype = Literal["float32", "float16", "bfloat16"]
Quantization = Literal[
    "int8", "int4", "fp8",
    "awq", "bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-nf4", "compressed-tensors", "eetq",
    "exl2", "gptq", "marlin",
]  # fmt: skip
LoraDtype = Literal["bfloat16", "float16"]
KvCacheDtype = Literal["fp8_e4m3fn", "fp8_e5m2"]
Device = Literal["cpu", "cuda"]
UnknownAdapter = Literal["refuse", "base"]
ToolCallFormat = Literal["auto", "tgi", "openai"]
GrammarBackend = Literal["auto", "llguidance", "outlines"]
CallParser = Literal[
    "auto", "hermes", "qwen3_coder", "glm4", "llama3", "mistral", "granite", "deepseek_v3",
    "kimi_k2", "harmony", "tokenwire",
]  # fmt: skip
ReasoningParser = Literal["auto", "none", "think", "harmony"]
Exemption = Literal["none", "health", "metrics", "reflection", "docs"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

_MAX_SOCKET_PATH = 107  # bytes; Linux has 108 for the path of a Unix socket and its final zero
_AFFINITY_LOAD = 1.5
_MAX_PORT = 65535
_MAX_THREADS = 1024  # systems refuse to start many more in a process
# Text takes a small part of the work, and each process has a tokenizer and grammars of its own.
_CORES_PER_WORKER = 8
_MAX_DEFAULT_WORKERS = 4


BUNDLED_MODEL = "tokenwire/demo"  # not a hub id: the model that comes with the server


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All options of all processes. None stands for what is derived or absent.

    Raises:
        SettingsError: a value is out of bounds, or two contradict each other.
    """

    # The model.
    model_id: Annotated[
        str, About("a local directory, a GGUF file, a hub id, or the bundled tokenwire/demo")
    ] = BUNDLED_MODEL
    revision: Annotated[str | None, About("the revision on the hub")] = None
    dtype: Annotated[
        Dtype | None,
        About(
            "number format to which weights are rounded; none on a CPU, the model's own on a GPU; "
            "a CPU computes in float32 with them, and multiplies bfloat16 if it has AVX-512 BF16"
        ),
    ] = None
    quantize: Annotated[
        Quantization | None,
        About(
            "weights in fewer bits: int8, int4, fp8; or how the checkpoint was quantised already"
        ),
    ] = None
    kv_cache_dtype: Annotated[
        KvCacheDtype | None,
        About("number format of the KV cache, half the size; otherwise the model's"),
    ] = None
    lora_adapters: Annotated[
        tuple[str, ...],
        About("LoRA adapters for requests to choose: name=directory, or a hub id"),
    ] = ()
    lora_adapter_directory: Annotated[
        Path | None,
        About("below it lie adapters that admins may load while the server runs", ours=True),
    ] = None
    max_loras: Annotated[
        int | None,
        About(
            "adapters on the device, in one step; otherwise 8, or as many as at start",
            ours=True,
            low=1,
        ),
    ] = None
    max_cpu_loras: Annotated[
        int | None,
        About(
            "adapters that can be loaded; otherwise 32, or as many as at start", ours=True, low=1
        ),
    ] = None
    lora_dtype: Annotated[
        LoraDtype | None,
        About("number format that adapters are rounded to; otherwise as the model's", ours=True),
    ] = None
    trust_remote_code: Annotated[bool, About("let code that comes with the model run")] = False
    tokenizer_config_path: Annotated[
        Path | None, About("a tokenizer_config.json to use instead of the model's")
    ] = None

    # Limits on requests.
    max_concurrent_requests: Annotated[
        int,
        About("requests served at a time; more are refused, except a caller's share", low=1),
    ] = 128
    max_concurrent_requests_per_caller: Annotated[
        int | None,
        About("of these, requests of one caller: key, certificate, x-tenant or address", low=1),
    ] = None
    max_waiting_seconds: Annotated[
        float,
        About(
            "a request that has waited so long for its first step is refused; 0: no bound", low=0
        ),
    ] = 60.0
    max_best_of: Annotated[int, About("largest best_of", low=1)] = 2
    max_stop_sequences: Annotated[int, About("stop sequences of a request", low=0)] = 4
    max_top_n_tokens: Annotated[int, About("largest top_n_tokens", low=0)] = 5
    max_input_tokens: Annotated[
        int | None,
        About(
            "tokens of a prompt; otherwise max_total_tokens - 1", low=1, alias="max_input_length"
        ),
    ] = None
    max_total_tokens: Annotated[
        int | None,
        About("tokens of a prompt and its continuation; otherwise the model decides", low=2),
    ] = None
    unknown_adapter: Annotated[
        UnknownAdapter,
        About("what an adapter that is not served means: an error, or TGI's base model", ours=True),
    ] = "refuse"
    max_client_batch_size: Annotated[int, About("prompts in one request", low=1)] = 4
    max_choices: Annotated[int, About("answers to one prompt (`n`)", ours=True, low=1)] = 16
    max_request_bytes: Annotated[int, About("bytes of a request's body", ours=True, low=1)] = (
        2_097_152
    )
    max_request_values: Annotated[
        int, About("JSON values in a request, keys not counted", ours=True, low=1)
    ] = 32_768
    max_messages: Annotated[int, About("messages of a conversation", ours=True, low=1)] = 4096
    max_message_parts: Annotated[int, About("parts of a message's content", ours=True, low=1)] = (
        1024
    )
    max_tools: Annotated[int, About("tools of a conversation", ours=True, low=0)] = 1024
    max_stop_sequence_bytes: Annotated[int, About("bytes of a stop sequence", ours=True, low=1)] = (
        1024
    )
    max_tokenize_bytes: Annotated[
        int, About("bytes of a text whose tokens are listed", ours=True, low=1)
    ] = 1_048_576
    tokenize_deadline_seconds: Annotated[
        float, About("how long a long text may take to tokenise", ours=True, low=0.1)
    ] = 10.0
    max_pending_bytes: Annotated[
        int, About("bytes of requests that are read or tokenised at a time", ours=True, low=1)
    ] = 16_777_216
    max_images: Annotated[
        int, About("images of a conversation, for models that take them", ours=True, low=1)
    ] = 8
    max_image_pixels: Annotated[int, About("pixels of an image", ours=True, low=1)] = 16_777_216
    max_image_bytes: Annotated[int, About("bytes of an image's file", ours=True, low=1)] = 8_388_608
    image_deadline_seconds: Annotated[
        float, About("how long an image may take to decode", ours=True, low=0.1)
    ] = 10.0
    image_fetch_seconds: Annotated[
        float, About("how long an image may take to fetch", ours=True, low=0.1)
    ] = 5.0
    allowed_media_domains: Annotated[
        tuple[str, ...],
        About("hosts that images are fetched from: example.com, example.com:8443; none by default"),
    ] = ()
    disable_grammar_support: Annotated[bool, About("refuse requests with a grammar")] = False
    grammar_deadline_seconds: Annotated[
        float, About("how long a grammar may take to compile", ours=True, low=0.1)
    ] = 5.0
    grammar_best_effort: Annotated[
        bool, About("ignore keywords of a schema that cannot be enforced", ours=True)
    ] = False
    grammar_strict_formats: Annotated[
        bool, About("refuse formats of strings that are not known", ours=True)
    ] = False

    grammar_backend: Annotated[
        GrammarBackend,
        About("library that enforces grammars; auto: outlines where only it is exact", ours=True),
    ] = "auto"

    # The watermark of requests that ask for one. The defaults are TGI's:
    # server/text_generation_server/utils/watermark.py at v2.1.1.
    watermark_gamma: Annotated[
        float, About("share of the vocabulary that a watermark favours, > 0 and < 1")
    ] = 0.5
    watermark_delta: Annotated[
        float, About("what a watermark adds to the logits of those tokens", low=0, high=100)
    ] = 2.0

    # Batching.
    max_batch_prefill_tokens: Annotated[int, About("tokens computed in one step", low=1)] = 2048
    max_batch_total_tokens: Annotated[
        int | None,
        About("tokens that the KV cache holds; otherwise what fits into the memory", low=1),
    ] = None
    prefill_chunk: Annotated[
        int | None,
        About("tokens of prompts in a step for which others wait; by device", ours=True, low=1),
    ] = None
    max_batch_size: Annotated[int | None, About("sequences running at a time", low=1)] = None
    speculate: Annotated[
        int, About("draft tokens from the text so far, checked in one step; 0 for none", low=0)
    ] = 0
    waiting_served_ratio: Annotated[
        float, About("reported only: new work joins the batch at every step", low=0)
    ] = 0.3
    max_waiting_tokens: Annotated[
        int, About("reported only: new work joins the batch at every step", low=0)
    ] = 20
    cuda_graphs: Annotated[
        tuple[int, ...],
        About("batch sizes recorded on a GPU; a CPU records all up to 64; 0 for none", low=0),
    ] = GRAPH_SIZES
    run_ahead: Annotated[
        bool | None,
        About("launch a step before the last is read; otherwise on a GPU only", ours=True),
    ] = None
    validation_workers: Annotated[int, About("tokenizer threads", low=1)] = 2

    # The device.
    device: Annotated[Device | None, About("otherwise a GPU if there is one", ours=True)] = None
    num_shard: Annotated[
        int,
        About(
            "GPUs, or groups of cores, among which the model's layers are divided", low=1, high=64
        ),
    ] = 1
    sharded: Annotated[
        bool | None, About("false: the model is whole whatever num_shard is; true needs num_shard")
    ] = None
    cuda_memory_fraction: Annotated[
        float, About("share of the GPU's memory to use", low=0.01, high=1)
    ] = 0.9
    num_threads: Annotated[
        int | None,
        About(
            "CPU threads of the model; otherwise one per core", ours=True, low=1, high=_MAX_THREADS
        ),
    ] = None
    block_size: Annotated[int, About("tokens in a block of the KV cache", ours=True, low=1)] = 16
    prefix_caching: Annotated[bool, About("share the KV cache of equal beginnings", ours=True)] = (
        True
    )
    native_kernels: Annotated[bool, About("use the kernels for CPUs and GPUs", ours=True)] = True

    # The network.
    hostname: Annotated[
        str,
        About("IP address of the public port; 0.0.0.0, TGI's default, opens it to every network"),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        About("public port for REST, gRPC and gRPC-Web; 0 takes a free one", low=0, high=_MAX_PORT),
    ] = 8080
    grpc_host: Annotated[
        str,
        About("where the service listens for gRPC callers and for probes", ours=True),
    ] = "127.0.0.1"
    grpc_port: Annotated[
        int,
        About("the service's own gRPC port; 0 takes a free one", ours=True, low=0, high=_MAX_PORT),
    ] = 50051
    admin_port: Annotated[
        int | None,
        About(
            "port of Envoy's admin pages on 127.0.0.1: every local user may then read its "
            "configuration, end it or drain it; otherwise they are on a socket of our user alone",
            ours=True,
            low=0,
            high=_MAX_PORT,
        ),
    ] = None
    engine_socket: Annotated[
        Path | None,
        About("Unix socket between service and engine; serve makes one of its own", ours=True),
    ] = None
    gateway_socket: Annotated[
        Path | None,
        About("Unix socket on which the service takes Envoy's calls; serve makes one", ours=True),
    ] = None
    gateway_port: Annotated[
        int | None,
        About(
            "port on which the service takes Envoy's calls, where Envoy runs elsewhere",
            ours=True,
            low=1,
            high=_MAX_PORT,
        ),
    ] = None
    service_addresses: Annotated[
        tuple[str, ...],
        About(
            "gateway ports of several servers that Envoy alone spreads requests over, host:port; "
            "all addresses of a name are servers",
            ours=True,
        ),
    ] = ()
    service_endpoints_file: Annotated[
        Path | None,
        About("a file with such addresses, IP:port, one a line; followed if it changes", ours=True),
    ] = None
    service_resolvers: Annotated[
        tuple[str, ...],
        About(
            "DNS servers, IP:port, that are asked for names in service-addresses instead of the "
            "system's",
            ours=True,
        ),
    ] = ()
    server_affinity: Annotated[
        tuple[Affinity, ...],
        About(
            "requests alike in the first of these that they have go to the same server: session "
            "(x-session-id), caller (API key), beginning; otherwise to the one with the fewest",
            ours=True,
        ),
    ] = ()
    server_affinity_load: Annotated[
        float,
        About(
            "requests of a server by affinity, as a multiple of the average; beyond it others help",
            ours=True,
            low=1,
            high=100,
        ),
    ] = _AFFINITY_LOAD
    cors_allow_origin: Annotated[
        tuple[str, ...],
        About("an origin that browsers may call from; otherwise all may, with API keys none"),
    ] = ()

    # Who may come in.
    api_key_file: Annotated[
        Path | None,
        About("lines of `tokenwire key`; then callers need one of these keys", ours=True),
    ] = None
    api_key_exempt: Annotated[
        tuple[Exemption, ...],
        About("what needs no API key: none, health, metrics, reflection, docs", ours=True),
    ] = ("health",)
    admin_key_file: Annotated[
        Path | None,
        About("the same for admins, who alone may load and unload adapters", ours=True),
    ] = None
    tls_certificate: Annotated[
        Path | None, About("PEM chain of the public port", ours=True, alias="tls_cert")
    ] = None
    tls_key: Annotated[Path | None, About("PEM key of the public port", ours=True)] = None
    tls_client_ca: Annotated[
        Path | None,
        About("PEM of who signs callers' certificates, which the public port then asks", ours=True),
    ] = None
    grpc_tls_certificate: Annotated[
        Path | None,
        About("PEM chain of the service's own gRPC port", ours=True, alias="grpc_tls_cert"),
    ] = None
    grpc_tls_key: Annotated[
        Path | None, About("PEM key of the service's own gRPC port", ours=True)
    ] = None
    grpc_tls_client_ca: Annotated[
        Path | None,
        About("the same as --tls-client-ca for the service's own gRPC port", ours=True),
    ] = None
    max_connection_seconds: Annotated[
        int,
        About("after which a connection is closed between requests; 0 for never", ours=True, low=0),
    ] = 3600
    max_gateway_bytes: Annotated[
        int,
        About("memory of Envoy, close to which it refuses requests", ours=True, low=64 << 20),
    ] = 2 << 30

    # Operation.
    replicas: Annotated[
        int,
        About(
            "engines with the same model, each with GPUs or a group of cores of its own",
            ours=True,
            low=1,
            high=64,
        ),
    ] = 1
    replica_affinity: Annotated[
        bool,
        About("of several engines, let one that knows a prompt's beginning compute it", ours=True),
    ] = True
    service_workers: Annotated[
        int | None,
        About(
            "service processes that share the work on text; otherwise one per 8 cores, 4 at most",
            ours=True,
            low=1,
            high=64,
        ),
    ] = None
    drain_seconds: Annotated[
        float, About("how long running requests may go on after SIGTERM", ours=True, low=0)
    ] = 90.0
    engine_stall_seconds: Annotated[
        float,
        About(
            "without a sign of life this long engine, service or Envoy is restarted",
            ours=True,
            low=1,
        ),
    ] = 10.0
    log_level: Annotated[LogLevel, About("least level that is logged")] = "info"
    json_output: Annotated[bool, About("write nothing but JSON lines")] = False
    access_log: Annotated[
        bool, About("log a line for every call, without its content", ours=True)
    ] = True
    otlp_endpoint: Annotated[
        str | None,
        About("collector that traces go to, by OTLP; the variables OTEL_* say more, if need be"),
    ] = None
    otlp_service_name: Annotated[
        str | None,
        About(
            "name of the server in traces and metrics; otherwise text-generation-inference.router"
        ),
    ] = None
    otlp_content: Annotated[
        bool, About("let traces have the texts of prompts and answers", ours=True)
    ] = False
    tool_call_format: Annotated[
        ToolCallFormat,
        About(
            "form of tool calls in answers: the contract's, OpenAI's, or that of the tools given",
            ours=True,
        ),
    ] = "auto"
    tool_call_parser: Annotated[
        CallParser,
        About("form in which the model writes tool calls; auto: by its template", ours=True),
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParser,
        About("form in which the model writes its reasoning; auto: by its template", ours=True),
    ] = "auto"
    escape_special_tokens: Annotated[
        bool,
        About("take special tokens that callers spell in conversations for plain text", ours=True),
    ] = False
    compute_type: Annotated[
        str | None, About("what x-compute-type says; otherwise 1- and the device")
    ] = None
    build_sha: Annotated[
        str | None, About("the commit that runs, for /info; images set it", ours=True)
    ] = None
    build_label: Annotated[
        str | None,
        About("the image that runs, for /info and fingerprints; images set it", ours=True),
    ] = None

    def __post_init__(self) -> None:
        for option in OPTIONS:
            option.check(getattr(self, option.name))
        self._check_tokens()
        self._check_adapters()
        self._check_shards()
        if self.grammar_backend == "outlines" and find_spec("outlines_core") is None:
            raise SettingsError("`grammar_backend` outlines needs the package's extra `outlines`")
        if not 0 < self.watermark_gamma < 1:
            raise SettingsError(
                f"`watermark_gamma` must be > 0 and < 1. Given: {self.watermark_gamma}"
            )
        if not is_ip_address(self.hostname):
            raise SettingsError(f"`hostname` must be an IP address. Given: {self.hostname}")
        for prefix in ("", "grpc_"):
            self._check_tls(prefix)
        self._check_servers()
        self._check_sockets()
        try:
            MediaHosts.of(self.allowed_media_domains)
        except ValueError as error:
            raise SettingsError(f"`allowed_media_domains`: {error}") from None

    def _check_sockets(self) -> None:
        engines = () if self.engine_socket is None else self.engine_sockets
        for name, paths in (
            ("engine_socket", engines),
            ("gateway_socket", self._own_gateway_socket),
        ):
            for path in paths:
                if len(bytes(path)) > _MAX_SOCKET_PATH:
                    raise SettingsError(
                        f"`{name}` must be <= {_MAX_SOCKET_PATH} bytes. Given: {path}"
                    )

    def _check_tls(self, prefix: str) -> None:
        names = [f"{prefix}tls_{name}" for name in ("certificate", "key", "client_ca")]
        certificate, key, client_ca = (getattr(self, name) for name in names)
        if (certificate is None) != (key is None):
            raise SettingsError(f"`{names[0]}` and `{names[1]}` must be given together")
        if client_ca is not None and certificate is None:
            raise SettingsError(f"`{names[2]}` needs `{names[0]}` and `{names[1]}`")

    def _check_servers(self) -> None:
        if self.service_addresses and self.service_endpoints_file is not None:
            raise SettingsError(
                "`service_addresses` and `service_endpoints_file` cannot both be given"
            )
        addresses = _parse_addresses("service_addresses", self.service_addresses)
        resolvers = _parse_addresses("service_resolvers", self.service_resolvers)
        for resolver in resolvers:
            if resolver.is_name:
                raise SettingsError(f"`service_resolvers`: {resolver} is not an IP address")
        if self.service_addresses and self.gateway_port is not None:
            raise SettingsError("`service_addresses` and `gateway_port` cannot both be given")
        if not self.server_affinity and self.server_affinity_load != _AFFINITY_LOAD:
            raise SettingsError("`server_affinity_load` needs `server_affinity`")
        if resolvers and not any(address.is_name for address in addresses):
            raise SettingsError("`service_resolvers` needs a name in `service_addresses`")
        if len(set(self.server_affinity)) < len(self.server_affinity):
            raise SettingsError(
                "`server_affinity` has something more than once. "
                f"Given: {','.join(self.server_affinity)}"
            )

    def _check_adapters(self) -> None:
        adapters = self.adapters
        names = [name for name, _ in adapters]
        for name, source in adapters:
            if not name or not source:
                raise SettingsError(
                    "`lora_adapters` has entries of the form name=directory. "
                    f"Given: {name}={source}"
                )
            if len(name) > MAX_NAME:
                raise SettingsError(
                    f"`lora_adapters`: a name must be <= {MAX_NAME} characters. Given: {len(name)}"
                )
            if has_control_characters(name):
                raise SettingsError(f"`lora_adapters`: a name has control characters: {name!r}")
            if names.count(name) > 1:
                raise SettingsError(f"`lora_adapters` has {name} more than once")
            if name == "tgi" or same_name(name, self.model_id):
                raise SettingsError(f"`lora_adapters`: {name} is a name of the model itself")
        most = self.max_cpu_loras
        if most is not None and max(len(names), self.max_loras or 0) > most:
            raise SettingsError(
                "`max_cpu_loras` must be >= `max_loras` and the number of `lora_adapters`. "
                f"Given: {most}"
            )

    def _check_shards(self) -> None:
        if self.sharded and self.num_shards == 1:
            raise SettingsError("`sharded` needs `num_shard`, which must be >= 2 with it")

    def _check_tokens(self) -> None:
        """TGI's start-up checks, as far as they apply to a cache without reservations."""
        total = self.max_total_tokens
        if total is None:
            return  # the service checks again when it knows the model's limit
        if self.max_input_tokens is not None and self.max_input_tokens >= total:
            raise SettingsError(
                "`max_input_tokens` must be < `max_total_tokens`. "
                f"Given: {self.max_input_tokens} and {total}"
            )
        if self.max_batch_total_tokens is not None and total > self.max_batch_total_tokens:
            raise SettingsError(
                "`max_total_tokens` must be <= `max_batch_total_tokens`. "
                f"Given: {total} and {self.max_batch_total_tokens}"
            )

    @property
    def model_path(self) -> str:
        """What the model is loaded from: a directory, a GGUF file, or a hub id."""
        return str(demo_model()) if self.model_id == BUNDLED_MODEL else resolve(self.model_id)

    @property
    def _own_gateway_socket(self) -> tuple[Path, ...]:
        return () if self.gateway_socket is None else (self.gateway_socket,)

    @property
    def num_service_workers(self) -> int:
        """How many service processes `serve` runs."""
        by_cores = min(num_processors() // _CORES_PER_WORKER, _MAX_DEFAULT_WORKERS)
        return self.service_workers or max(by_cores, 1)

    @property
    def engine_sockets(self) -> tuple[Path, ...]:
        """Where the service finds its engines; the sockets of several are numbered."""
        path = self.engine_socket
        assert path is not None
        if self.replicas == 1:
            return (path,)
        return tuple(
            path.with_name(f"{path.stem}-{number}{path.suffix}")
            for number in range(1, self.replicas + 1)
        )

    @property
    def upstream_host(self) -> str:
        """Where to reach the service."""
        return reachable(self.grpc_host)

    @property
    def probe_target(self) -> str:
        """Where the service is asked for its health: where Envoy asks, if there is such a place.

        There nobody needs a key or a certificate for that.
        """
        if self.gateway_socket is not None:
            return f"unix:{self.gateway_socket}"
        return address(self.upstream_host, self.gateway_port or self.grpc_port)

    @property
    def grpc_address(self) -> str:
        """Where the service listens for gRPC callers."""
        return address(self.grpc_host, self.grpc_port)

    @property
    def gateway_addresses(self) -> list[str]:
        """Where the service listens for Envoy, which is believed what it says of REST callers."""
        socket = [] if self.gateway_socket is None else [f"unix:{self.gateway_socket}"]
        port = [] if self.gateway_port is None else [address(self.grpc_host, self.gateway_port)]
        return [*socket, *port]

    @property
    def tls(self) -> TlsFiles | None:
        """The certificates of the public port."""
        return _tls_files(self.tls_certificate, self.tls_key, self.tls_client_ca)

    @property
    def grpc_tls(self) -> TlsFiles | None:
        """The certificates of the service's own gRPC port."""
        return _tls_files(self.grpc_tls_certificate, self.grpc_tls_key, self.grpc_tls_client_ca)

    @property
    def adapters(self) -> tuple[tuple[str, str], ...]:
        """The names of adapters, and where each is: a directory or a hub id.

        Without a name, this is its name.
        """
        split = ([part.strip() for part in entry.partition("=")] for entry in self.lora_adapters)
        return tuple((name, source if sign else name) for name, sign, source in split)

    @property
    def num_shards(self) -> int:
        """The processes that compute the model together."""
        return 1 if self.sharded is False else self.num_shard

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """Where browsers may call from; `*` stands for everywhere."""
        # Where callers have keys, only those pages may use one whose origin was thought of.
        return self.cors_allow_origin or (("*",) if self.api_key_file is None else ())

    def trace_export(self, environment: Mapping[str, str]) -> TraceExport | None:
        """Where traces go, by these settings and OpenTelemetry's variables; None for nowhere.

        Raises:
            SettingsError: they cannot go there.
        """
        return trace_export(self.otlp_endpoint, self.otlp_service_name, environment)

    def metric_export(self, environment: Mapping[str, str]) -> Export | None:
        """Where metrics are pushed to, likewise.

        Raises:
            SettingsError: they cannot go there.
        """
        return metric_export(self.otlp_endpoint, self.otlp_service_name, environment)

    def engine_config(self, socket_path: Path) -> EngineConfig:
        """Returns the engine's configuration."""
        batch_size: dict[str, Any] = (
            {} if self.max_batch_size is None else {"max_num_seqs": self.max_batch_size}
        )
        return EngineConfig(
            model_id=self.model_path,
            socket_path=socket_path,
            revision=self.revision,
            dtype=self.dtype,
            quantize=self.quantize,
            kv_cache_dtype=self.kv_cache_dtype,
            device=self.device,
            adapters=self.adapters,
            adapter_directory=self.lora_adapter_directory,
            max_loras=self.max_loras,
            max_cpu_loras=self.max_cpu_loras,
            lora_dtype=self.lora_dtype,
            num_shards=self.num_shards,
            trust_remote_code=self.trust_remote_code,
            block_size=self.block_size,
            max_total_tokens=self.max_total_tokens,
            max_batch_total_tokens=self.max_batch_total_tokens,
            max_step_tokens=self.max_batch_prefill_tokens,
            max_chunk_tokens=self.prefill_chunk,
            graph_sizes=self.cuda_graphs,
            run_ahead=self.run_ahead,
            speculate=self.speculate,
            memory_fraction=self.cuda_memory_fraction,
            num_threads=self.num_threads,
            enable_prefix_caching=self.prefix_caching,
            enable_native_kernels=self.native_kernels,
            watermark_gamma=self.watermark_gamma,
            watermark_delta=self.watermark_delta,
            **batch_size,
        )

    def gateway_config(
        self,
        descriptors: Path,
        admin_socket: Path | None = None,
        traces: TraceExport | None = None,
        sockets: tuple[Path, ...] = (),
    ) -> GatewayConfig:
        """Returns Envoy's parameters.

        Args:
            descriptors: the compiled descriptor set.
            admin_socket: of Envoy's admin interface.
            traces: where spans go.
            sockets: of several service processes; otherwise the one of these settings.

        Raises:
            SettingsError: it is not said where the service takes Envoy's calls, or where several
                servers do so cannot be read.
        """
        if sockets and (self.service_addresses or self.service_endpoints_file is not None):
            raise SettingsError(
                "`service_addresses` and `service_endpoints_file` are for `tokenwire envoy`; "
                "`tokenwire serve` has services of its own"
            )
        servers = self._servers()
        if servers is None and self.gateway_socket is None and self.gateway_port is None:
            raise SettingsError(
                "--gateway-socket, --gateway-port, --service-addresses or --service-endpoints-file "
                "is needed where Envoy runs alone"
            )
        return GatewayConfig(
            listen_host=self.hostname,
            listen_port=self.port,
            upstream_host=self.upstream_host,
            upstream_port=self.gateway_port or 0,
            upstream_sockets=sockets or self._own_gateway_socket,
            servers=servers,
            descriptors=descriptors,
            admin_port=self.admin_port,
            admin_socket=admin_socket,
            max_request_bytes=self.max_request_bytes,
            # Above the service's own limit, which answers in TGI's words.
            max_requests=max(4096, 2 * self.max_concurrent_requests),
            cors_allow_origins=self.allowed_origins,
            tls=self.tls,
            max_connection_seconds=self.max_connection_seconds,
            max_heap_bytes=self.max_gateway_bytes,
            traces=traces,
            access_log=self.access_log,
            json_output=self.json_output,
        )

    def _servers(self) -> Servers | None:
        """The servers that an Envoy of its own spreads requests over, if there are several."""
        addresses, path = parse_addresses(self.service_addresses), self.service_endpoints_file
        affinity, max_load = self.server_affinity, self.server_affinity_load
        if path is not None:
            try:
                addresses = read_endpoints(path)
            except (OSError, ValueError) as error:
                raise SettingsError(f"{flag('service_endpoints_file')}: {error}") from None
        if not addresses:
            if affinity:
                raise SettingsError(
                    "`server_affinity` needs `service_addresses` or `service_endpoints_file`"
                )
            return None
        return Servers(
            addresses=addresses,
            endpoints_file=path,
            resolvers=parse_addresses(self.service_resolvers),
            affinity=affinity,
            max_load=max_load,
        )

    def to_argv(self) -> list[str]:
        """Returns flags that make the same settings, given an environment `without_settings`."""
        return [
            f"{option.flags[0]}={item}"
            for option in OPTIONS
            for item in spell(getattr(self, option.name))
        ]


def _parse_addresses(name: str, texts: tuple[str, ...]) -> tuple[Address, ...]:
    try:
        return parse_addresses(texts)
    except ValueError as error:
        raise SettingsError(f"`{name}`: {error}") from None


def _tls_files(
    certificate: Path | None, key: Path | None, client_ca: Path | None
) -> TlsFiles | None:
    return None if certificate is None or key is None else TlsFiles(certificate, key, client_ca)


def reachable(host: str) -> str:
    """Returns the address to connect to, for an address to listen on, which may mean all."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound


def _options() -> Iterator[Option]:
    hints = get_type_hints(Settings, include_extras=True)
    for item in fields(Settings):
        kind, about = get_args(hints[item.name])
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = (part for part in get_args(kind) if part is not type(None))
        yield Option(name=item.name, kind=kind, default=item.default, about=about)


OPTIONS = tuple(_options())


def address(host: str, port: int) -> str:
    """Host and port as one text, IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
