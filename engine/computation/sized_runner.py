"""The model with its KV cache, which gets the memory that the largest step leaves."""

from __future__ import annotations

import logging

from ..adapters.bank import AdapterBank
from ..attention.kv_cache import KVCache, bytes_per_block
from ..block_form import BlockForm
from ..executor import Executor
from ..memory import cache_size
from ..memory.worst_step import StepBounds
from ..model.model_runner import ModelRunner
from ..model.prepare import PreparedModel
from ..protocol.config import EngineConfig
from ..recurrent.layer_state import StatePool, bytes_per_slot
from ..sampling.watermark import Watermark
from ..shards.group import Group
from .adapters import adapted, slotted

logger = logging.getLogger(__name__)


def sized_runner(
    config: EngineConfig,
    model: PreparedModel,
    bounds: StepBounds,
    watermark: Watermark,
    adapters: AdapterBank | None,
    group: Group | None,
) -> ModelRunner:
    """The model with its KV cache, which gets the memory that the largest step leaves.

    Raises:
        ModelLoadError: there is not enough memory.
    """
    loaded = model.loaded
    form = bounds.form
    cache = _cache(config, model, 1, form)
    runner = ModelRunner(loaded, cache, model.backend, loaded.state_pool(1))
    forward = slotted(adapted(runner.forward, adapters), adapters)
    executor = Executor(forward, loaded.device, config.block_size, watermark, form=form)
    room = cache_size.room_for_cache(config, executor, bounds, loaded.device)
    if group is not None:  # on a host they share the memory, and all have as many blocks
        room = group.least(room // (group.size if loaded.device.type == "cpu" else 1))
    per_block = bytes_per_block(loaded.layers, config.block_size, model.cache_dtype, form)
    if loaded.recurrence is not None:
        runner.pool = _state_pool(config, model, bounds, room, per_block)
        room -= runner.pool.num_slots * runner.pool.bytes_per_slot
    num_blocks = cache_size.num_blocks(
        config, room, per_block, model.max_total_tokens, loaded.device, form
    )
    runner.cache = _cache(config, model, num_blocks, form)
    return runner


def _state_pool(
    config: EngineConfig, model: PreparedModel, bounds: StepBounds, room: int, per_block: int
) -> StatePool:
    """States of sequences, of prefixes, and before draft tokens; the cache gets what is left.

    Raises:
        ModelLoadError: there is not enough memory.
    """
    loaded = model.loaded
    assert loaded.recurrence is not None
    states = loaded.recurrence.states
    per_slot = bytes_per_slot(states)
    num_seqs = cache_size.num_state_slots(bounds.max_num_seqs, room, per_slot)
    room -= num_seqs * per_slot
    num_copies = cache_size.num_state_copies(
        config, room, per_slot, per_block, bounds.max_total_tokens, loaded.device
    )
    logger.info(
        "states of %d bytes: %d of running sequences, %d for prefixes and draft tokens",
        per_slot,
        num_seqs,
        num_copies,
    )
    if config.speculate > num_copies:
        logger.warning("%d draft tokens at most, of all sequences: each has a state", num_copies)
    return StatePool(states, num_seqs, loaded.device, num_copies)


def _cache(
    config: EngineConfig, model: PreparedModel, num_blocks: int, form: BlockForm | None
) -> KVCache:
    loaded, size = model.loaded, config.block_size
    windowed = () if form is None else form.windowed(loaded.windows)
    return KVCache(
        loaded.layers, num_blocks, size, model.cache_dtype, loaded.device, form, windowed
    )
