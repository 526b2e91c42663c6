"""What the server tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.config import EngineInfo

from .limits import Limits
from .settings import Settings

ROUTER = "text-generation-router"  # what TGI's clients look for
VERSION = "2.1.2-dev0"  # the contract that is served


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The model, the limits and the build."""

    engine: EngineInfo
    limits: Limits
    settings: Settings
    compute_type: str
    sha: str | None = None
    docker_label: str | None = None

    @property
    def model_id(self) -> str:
        """The model's hub id or directory, as it was configured."""
        return self.settings.model_id

    @property
    def system_fingerprint(self) -> str:
        """The version and the build, as TGI puts them together."""
        return f"{VERSION}-{self.docker_label or 'native'}"

    def to_contract(self) -> dict[str, Any]:
        """The fields of the contract's Info, in its order."""
        return {
            "model_id": self.model_id,
            "model_sha": self.engine.model_sha,
            "model_dtype": self.engine.dtype,
            "model_device_type": self.engine.device,
            "model_pipeline_tag": None,
            "max_concurrent_requests": self.limits.max_concurrent_requests,
            "max_best_of": self.limits.max_best_of,
            "max_stop_sequences": self.limits.max_stop_sequences,
            "max_input_tokens": self.limits.max_input_tokens,
            "max_total_tokens": self.limits.max_total_tokens,
            "waiting_served_ratio": self.settings.waiting_served_ratio,
            "max_batch_total_tokens": self.engine.max_batch_total_tokens,
            "max_waiting_tokens": self.settings.max_waiting_tokens,
            "max_batch_size": self.settings.max_batch_size,
            "validation_workers": self.settings.validation_workers,
            "max_client_batch_size": self.limits.max_client_batch_size,
            "router": ROUTER,
            "version": VERSION,
            "sha": self.sha,
            "docker_label": self.docker_label,
        }
