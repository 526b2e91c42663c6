"""The form of the cache's blocks for models with layers that see only a window of a text."""

from __future__ import annotations

import logging

from ..block_form import BlockForm, choose_form
from ..model.prepare import PreparedModel
from ..protocol.config import EngineConfig

logger = logging.getLogger(__name__)


def window_form(config: EngineConfig, model: PreparedModel) -> BlockForm | None:
    """The form of blocks with which layers with a window keep no more than it; None for one kind.

    Layers must be of one shape if some of them see everything, since they share the blocks.
    """
    loaded = model.loaded
    windows = [size for size in loaded.windows.values() if size < model.max_total_tokens]
    num_whole = len(loaded.layers) - len(windows)
    is_alike = not num_whole or len(set(loaded.layers.values())) == 1
    if not windows or not is_alike or loaded.recurrence is not None:
        return None
    form = choose_form(
        num_whole=num_whole,
        num_windowed=len(windows),
        window=max(windows),
        block_size=config.block_size,
        max_total_tokens=model.max_total_tokens,
    )
    if form is not None:
        logger.info(
            "%d of %d layers keep a window of %d tokens",
            len(windows),
            len(loaded.layers),
            form.window,
        )
    return form
