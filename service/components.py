"""The components of a service, each made of what the settings say of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.protocol.config import EngineInfo

from .access.keys import watch_keys
from .access.media_hosts import MediaHosts
from .api.authentication import Authenticator
from .generation.adapters import Adapters
from .generation.engine_client import EngineClient
from .generation.engine_pool import EnginePool
from .generation.engines import Engines
from .generation.limits import Limits
from .generation.metrics import Metrics
from .generation.server_info import ServerInfo
from .grammar.checker import GrammarChecker
from .images.image_workers import ImageWorkers
from .images.images import Images
from .launch.kept import kept_file
from .launch.place import Place
from .launch.settings import Settings
from .metrics.resource import own_attributes
from .text.long_texts import LongTexts
from .text.tokenizer import TextTokenizer

if TYPE_CHECKING:  # else libraries would be imported that most servers do not need
    from .images.fetcher import ImageFetcher
    from .tracing.export import TraceSender


def make_engines(clients: Sequence[EngineClient], settings: Settings) -> Engines:
    """The only engine, or the pool of several."""
    if len(clients) == 1:
        return clients[0]
    return EnginePool(
        clients,
        prefix_affinity=settings.replica_affinity,
        max_waiting_s=settings.max_waiting_seconds or None,
    )


def make_authenticator(settings: Settings) -> Authenticator:
    """What knows callers by their keys, in files that are followed.

    Raises:
        OSError, ValueError: a file of keys cannot be used.
    """
    files = (("api-keys", settings.api_key_file), ("admin-keys", settings.admin_key_file))
    keys, admin_keys = (
        None if path is None else watch_keys(path, kept_file(name)).current for name, path in files
    )
    return Authenticator(keys, settings.api_key_exempt, admin_keys)


def make_trace_sender(settings: Settings, place: Place | None) -> TraceSender | None:
    """What sends traces; None, and nothing imported, where none are asked for.

    Raises:
        ValueError: they cannot be sent.
    """
    export = settings.trace_export(os.environ)
    if export is None:
        return None
    from .tracing.export import TraceSender

    return TraceSender(export, own_attributes(place))


def load_tokenizer(settings: Settings) -> TextTokenizer:
    """The model's tokenizer.

    Raises:
        ValueError: it cannot be used.
    """
    return TextTokenizer.load(
        settings.model_path,
        settings.revision,
        num_workers=settings.validation_workers,
        config_path=settings.tokenizer_config_path,
        trust_remote_code=settings.trust_remote_code,
    )


def make_long_texts(settings: Settings) -> LongTexts:
    """The processes for long texts, not started yet."""
    config_path = settings.tokenizer_config_path
    return LongTexts(
        f"{__package__}.text_worker",
        [
            settings.model_path,
            settings.revision,
            None if config_path is None else str(config_path),
            settings.trust_remote_code,
        ],
        deadline_s=settings.tokenize_deadline_seconds,
        max_bytes=settings.max_pending_bytes,
    )


def make_images(settings: Settings, limits: Limits) -> Images:
    """What makes images ready for the model; its processes are not started yet."""
    num_bytes = limits.max_images * limits.max_image_bytes  # of one request
    workers = ImageWorkers(
        [settings.model_path, settings.revision, settings.trust_remote_code],
        max_pixels=limits.max_image_pixels,
        deadline_s=settings.image_deadline_seconds,
        max_bytes=max(settings.max_pending_bytes, num_bytes),
    )
    return Images(
        workers,
        max_bytes=limits.max_image_bytes,
        max_fetched_bytes=num_bytes,
        fetcher=_image_fetcher(settings, limits),
    )


def _image_fetcher(settings: Settings, limits: Limits) -> ImageFetcher | None:
    """What fetches images; None, and nothing imported, where no host is listed."""
    if not limits.fetches_images:
        return None
    from .images.fetcher import ImageFetcher

    return ImageFetcher(
        MediaHosts.of(settings.allowed_media_domains),
        max_bytes=limits.max_image_bytes,
        deadline_s=limits.image_fetch_seconds,
    )


def make_grammar_checker(
    settings: Settings, info: EngineInfo, tokenizer: TextTokenizer, metrics: Metrics
) -> GrammarChecker:
    """What tries out grammars; its processes are not started yet."""
    return GrammarChecker(
        tokenizer.to_json(),
        info.vocab_size,
        tokenizer.eos_token_ids,
        enabled=not settings.disable_grammar_support,
        best_effort=settings.grammar_best_effort,
        strict_formats=settings.grammar_strict_formats,
        deadline_s=settings.grammar_deadline_seconds,
        backend=settings.grammar_backend,
        watcher=metrics,
    )


def make_adapters(settings: Settings, info: EngineInfo, engines: Engines) -> Adapters:
    """The adapters that requests may name."""
    return Adapters(
        lambda: engines.adapters,
        settings.model_id,
        unknown_is_base=settings.unknown_adapter == "base",
        may_change=info.loads_adapters,
    )


def make_server_info(
    settings: Settings,
    info: EngineInfo,
    limits: Limits,
    tokenizer: TextTokenizer,
    adapters: Adapters,
) -> ServerInfo:
    """What is served, for all who tell of it."""
    return ServerInfo(
        engine=info,
        limits=limits,
        model_id=settings.model_id,
        compute_type=settings.compute_type or f"1-{info.device}",
        tool_call_format=settings.tool_call_format,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
        escape_special_tokens=settings.escape_special_tokens,
        waiting_served_ratio=settings.waiting_served_ratio,
        max_waiting_tokens=settings.max_waiting_tokens,
        max_batch_size=settings.max_batch_size,
        validation_workers=settings.validation_workers,
        sha=settings.build_sha,
        docker_label=settings.build_label,
        eos_token_ids=tokenizer.eos_token_ids,
        adapters=adapters,
    )
