"""What the server reports about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.protocol.adapters import same_name
from engine.protocol.config import EngineInfo, RankMemory

from .adapters import Adapters
from .limits import Limits

ROUTER = "text-generation-router"  # what TGI's clients look for
VERSION = "2.1.2-dev0"  # the contract that is served


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """The model, the limits and the build.

    Attributes:
        engine: the description that the engine sent.
        limits: those in force.
        model_id: the model's hub id or directory, as it was configured.
        compute_type: the value of the header `x-compute-type`.
        tool_call_format: the form of tool calls, unless the caller's header says otherwise.
        tool_call_parser: the form in which the model writes calls, or `auto`.
        reasoning_parser: that of its reasoning, likewise.
        escape_special_tokens: whether special tokens that callers spell in a conversation are plain
            text, unless the request says otherwise.
        waiting_served_ratio: TGI's setting; reported, since clients print it.
        max_waiting_tokens: likewise.
        max_batch_size: sequences running at a time at most, if that was configured.
        validation_workers: threads that tokenise.
        sha: the commit that was built, if the build recorded it.
        docker_label: the image that was built, likewise.
        eos_token_ids: tokens that end a text.
        adapters: those beside the model.
    """

    engine: EngineInfo
    limits: Limits
    model_id: str
    compute_type: str
    tool_call_format: str
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    escape_special_tokens: bool = False
    waiting_served_ratio: float
    max_waiting_tokens: int
    max_batch_size: int | None
    validation_workers: int
    sha: str | None = None
    docker_label: str | None = None
    eos_token_ids: frozenset[int] = frozenset()
    adapters: Adapters = field(default_factory=Adapters)

    @property
    def model_names(self) -> tuple[str, ...]:
        """What a request can name as its model: the model, and the adapters beside it."""
        return (self.model_id, *self.adapters.names)

    @property
    def ranks(self) -> tuple[RankMemory, ...]:
        """What each rank of a divided model keeps in memory; nothing where it is not divided."""
        return self.engine.ranks if len(self.engine.ranks) > 1 else ()

    def find_model(self, name: str) -> str | None:
        """The model or adapter that a caller means by a name; None if there is none."""
        return next((served for served in self.model_names if same_name(name, served)), None)

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
            "waiting_served_ratio": self.waiting_served_ratio,
            "max_batch_total_tokens": self.engine.max_batch_total_tokens,
            "max_waiting_tokens": self.max_waiting_tokens,
            "max_batch_size": self.max_batch_size,
            "validation_workers": self.validation_workers,
            "max_client_batch_size": self.limits.max_client_batch_size,
            "router": ROUTER,
            "version": VERSION,
            "sha": self.sha,
            "docker_label": self.docker_label,
        }
