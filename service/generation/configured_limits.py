"""The limits in force: what settings, model and checkpoint make of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine.protocol.config import EngineInfo

from ..launch.settings import Settings
from .limits import Limits

logger = logging.getLogger(__name__)

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def make_limits(settings: Settings, info: EngineInfo) -> Limits:
    """The limits in force: those of the settings, or the engine's where a setting is absent.

    Raises:
        ValueError: the settings contradict each other or the engine.
    """
    max_total_tokens = settings.max_total_tokens or info.max_total_tokens
    if max_total_tokens > info.max_total_tokens:
        raise ValueError(
            f"max_total_tokens must be <= {info.max_total_tokens}, which the engine holds. "
            f"Given: {max_total_tokens}"
        )
    max_input_tokens = settings.max_input_tokens or max_total_tokens - 1
    if max_input_tokens >= max_total_tokens:
        raise ValueError(
            f"max_input_tokens must be < max_total_tokens. Given: {max_input_tokens} and "
            f"{max_total_tokens}"
        )
    return Limits(
        max_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_top_n_tokens=settings.max_top_n_tokens,
        max_input_tokens=max_input_tokens,
        max_total_tokens=max_total_tokens,
        max_client_batch_size=settings.max_client_batch_size,
        max_choices=settings.max_choices,
        max_request_values=settings.max_request_values,
        max_messages=settings.max_messages,
        max_message_parts=settings.max_message_parts,
        max_tools=settings.max_tools,
        max_stop_sequence_bytes=settings.max_stop_sequence_bytes,
        max_tokenize_bytes=settings.max_tokenize_bytes,
        vocab_size=info.vocab_size,
        **_image_limits(settings, info),
    )


def _image_limits(settings: Settings, info: EngineInfo) -> dict[str, Any]:
    """The limits on images; none for models that take none."""
    fetches = bool(settings.allowed_media_domains)
    if not _takes_images(settings, info):
        if fetches:
            logger.warning("no images are fetched: the model takes none")
        return {}
    return {
        "max_images": settings.max_images,
        "max_image_bytes": settings.max_image_bytes,
        "max_image_pixels": settings.max_image_pixels,
        "image_fetch_seconds": settings.image_fetch_seconds,
        "fetches_images": fetches,
    }


def _takes_images(settings: Settings, info: EngineInfo) -> bool:
    """Whether the model takes images, and the checkpoint says how they are made ready for it."""
    folder = Path(settings.model_path)
    if not info.takes_images or not folder.is_dir():
        return info.takes_images
    found = any((folder / name).is_file() for name in _PROCESSOR_FILES)
    if not found:
        logger.warning("no images: the checkpoint has none of %s", ", ".join(_PROCESSOR_FILES))
    return found
