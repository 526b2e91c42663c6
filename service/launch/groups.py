"""The settings as help shows them: in groups, and of a command only those that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..bundled import DESCRIPTORS
from .options import Option
from .settings import OPTIONS, Settings

# The title of a group, and the option that it begins with.
_GROUPS = {
    "model_id": "the model",
    "max_concurrent_requests": "limits on requests",
    "watermark_gamma": "the watermark",
    "max_batch_prefill_tokens": "batching",
    "device": "the device",
    "hostname": "the network",
    "api_key_file": "who may come in",
    "max_connection_seconds": "connections",
    "replicas": "operation",
}
_OF_ALL = {"log_level", "json_output"}


def grouped() -> Iterator[tuple[str, list[Option]]]:
    """The options in their order, by group."""
    title, group = "", list[Option]()
    for option in OPTIONS:
        if option.name in _GROUPS:
            if group:
                yield title, group
            title, group = _GROUPS[option.name], []
        group.append(option)
    yield title, group


def own_settings(command: str) -> frozenset[str]:
    """The names of the settings that a command reads; of `serve`, all.

    What engine and Envoy read is noted while their configuration is made, so it needs no list.
    """
    every = {option.name for option in OPTIONS}
    engine = _read_by(lambda settings: settings.engine_config(Path("socket"))) | {"model_id"}
    envoy = _read_by(lambda settings: settings.gateway_config(DESCRIPTORS), gateway_port=1)
    shared = {name for name in every if name.startswith(("max_", "grpc_", "gateway_", "api_key"))}
    shared -= {"max_gateway_bytes", "max_loras", "max_cpu_loras"}
    own = {
        "engine": engine | {"engine_socket"},
        "service": every - ((engine | envoy) - shared)
        - {"engine_stall_seconds", "admin_port", "service_workers"}
        | {"model_id", "revision", "engine_socket"},
        "envoy": envoy,
        "envoy-config": envoy,
        "health": _read_by(lambda settings: (settings.probe_target, settings.grpc_tls)),
    }  # fmt: skip
    return frozenset((own.get(command, every) | _OF_ALL) & every)


def _read_by(use: Callable[[Settings], object], **given: Any) -> set[str]:
    """The names of what a function reads of the settings, of which some are given."""
    noted: set[str] = set()

    class Noting(Settings):
        def __getattribute__(self, name: str) -> object:
            noted.add(name)
            return super().__getattribute__(name)

    settings = Noting(**given)
    noted.clear()  # what checks have read
    use(settings)
    return noted
