"""Sizes the KV cache, once: it gets the memory that the largest step leaves."""

from __future__ import annotations

import logging

import torch

from ..attention.kv_cache import free_memory
from ..block_form import NUM_PADDING, BlockForm
from ..executor import Executor
from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from ..replay.shapes import largest_by_kind, recorded_shapes
from .worst_step import StepBounds, compute, peak_bytes, recorded_bytes

logger = logging.getLogger(__name__)

_CPU_TOKENS = 16_384  # on the CPU by default: TGI's minimum of 16,000, in whole blocks
_CPU_FRACTION = 0.5  # … but at most this share of the free memory; the rest is for the steps
_STATES_FRACTION = 0.5  # of the room: what states take at most, where a model has them
_COPIES_FRACTION = 0.2  # of what these leave: states that are kept for later texts
_BLOCKS_WITHOUT_CACHE = 1 << 18  # of a model that has states only: they are but counted
_TOKENS_PER_COPY = 256  # of the cache: with a state for so many, more would hardly be found


def room_for_cache(
    config: EngineConfig, executor: Executor, bounds: StepBounds, device: torch.device
) -> int:
    """Bytes that the model and the largest possible steps leave for the cache.

    Such steps are computed to measure their memory; on a GPU only, since a CPU would need minutes
    for them with a large model. Recorded steps (`replay/cuda_graphs.py`) keep memory of their own,
    which they share: as much as the largest of them takes.

    Raises:
        ModelLoadError: there is not enough memory for such a step.
    """
    if device.type != "cuda":
        return free_memory(device)
    try:
        largest, kept = _measured(config, executor, bounds, device)
    except torch.AcceleratorError:
        raise  # the device itself fails, which more memory would not change
    except RuntimeError as error:
        raise ModelLoadError(
            f"Not enough memory to handle {bounds.max_step_tokens} prefill tokens. You need to "
            f"decrease `--max-batch-prefill-tokens`: {error}"
        ) from error
    logger.info(
        "beside the model the largest step takes %d MiB, and what is recorded %d MiB",
        largest >> 20,
        kept >> 20,
    )
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.memory_fraction) - (total - free) - largest - kept


def _measured(
    config: EngineConfig, executor: Executor, bounds: StepBounds, device: torch.device
) -> tuple[int, int]:
    """Bytes that the largest step takes, and bytes that recorded steps keep.

    Raises:
        RuntimeError: a step fails.
    """
    worst = (bounds.worst_prefill(), bounds.worst_decode(), bounds.worst_mixed())
    shapes = largest_by_kind(recorded_shapes(config)).values()
    recorded = [bounds.recorded(shape.num_tokens, shape.num_seqs) for shape in shapes]
    largest = max(peak_bytes(executor, batch, device) for batch in worst)
    kept = max((recorded_bytes(executor, batch, device) for batch in recorded), default=0)
    compute(executor, bounds.greedy())  # in the others all rows draw, by a kernel of its own
    return largest, kept


def num_state_slots(max_num_seqs: int, room: int, bytes_per_slot: int) -> int:
    """The number of states that a model keeps beside its cache, one for each running sequence.

    Args:
        max_num_seqs: the most sequences that shall run at the same time.
        room: bytes for states and cache together.
        bytes_per_slot: bytes of one state.

    Raises:
        ModelLoadError: there is not enough memory for one.
    """
    slots = min(max_num_seqs, int(max(0, room) * _STATES_FRACTION) // bytes_per_slot)
    if not slots:
        raise ModelLoadError(
            f"Not enough memory for the state of a sequence: it takes {bytes_per_slot} bytes, and "
            f"{max(0, room)} bytes are free"
        )
    if slots < max_num_seqs:
        logger.warning("%d sequences at most run at the same time: each has a state", slots)
    return slots


def num_state_copies(
    config: EngineConfig,
    room: int,
    bytes_per_slot: int,
    bytes_per_block: int,
    max_total_tokens: int,
    device: torch.device,
) -> int:
    """The number of states beside those of running sequences.

    They are kept for later texts with the same beginning, or are those before draft tokens.

    Args:
        config: may say how many tokens the cache shall hold, and has the most draft tokens.
        room: bytes for these states and the cache.
        bytes_per_slot: bytes of one state.
        bytes_per_block: bytes of a block of the cache.
        max_total_tokens: tokens of the longest sequence.
        device: by default a GPU's cache has all the tokens that fit.
    """
    block_size = config.block_size
    needed = max(max_total_tokens, config.max_batch_total_tokens or 0)
    left = min(int(room * _COPIES_FRACTION), room - -(-needed // block_size) * bytes_per_block)
    num_tokens = max(_CPU_TOKENS, needed)
    if device.type == "cuda" and bytes_per_block:
        num_tokens = room // bytes_per_block * block_size
    prefixes = -(-num_tokens // _TOKENS_PER_COPY) if config.enable_prefix_caching else 0
    return min(max(0, left) // bytes_per_slot, prefixes + config.speculate * config.max_num_seqs)


def num_blocks(
    config: EngineConfig,
    room: int,
    bytes_per_block: int,
    max_total_tokens: int,
    device: torch.device,
    form: BlockForm | None = None,
) -> int:
    """The number of blocks of the cache, which never grows later.

    Args:
        config: may say how many tokens the cache shall hold, in however short sequences.
        room: bytes that it may take.
        bytes_per_block: bytes of a block; 0 if no layer caches keys and values.
        max_total_tokens: tokens of the longest sequence.
        device: by default a GPU's cache takes all the room, and a CPU's does not.
        form: of blocks, where layers with a window have their own.

    Raises:
        ModelLoadError: the longest sequence or the configured number of tokens does not fit.
    """

    def blocks_of(num_tokens: int, lookahead: int) -> int:
        if form is None:
            return -(-num_tokens // config.block_size)
        return form.num_blocks(num_tokens, lookahead) + NUM_PADDING

    fitting = max(0, room) // (bytes_per_block or config.block_size)
    if config.max_batch_total_tokens is not None:
        blocks = blocks_of(config.max_batch_total_tokens, config.max_batch_total_tokens)
    elif device.type == "cuda":
        blocks = fitting if bytes_per_block else min(fitting, _BLOCKS_WITHOUT_CACHE)
    else:
        num_tokens = max(_CPU_TOKENS, max_total_tokens)
        blocks = min(blocks_of(num_tokens, num_tokens), int(fitting * _CPU_FRACTION))
    needed = blocks_of(max_total_tokens, config.max_step_tokens)
    if config.max_batch_total_tokens is not None and blocks < needed:
        raise ModelLoadError(
            f"`max_batch_total_tokens={config.max_batch_total_tokens}` is less than one text may "
            f"take: the KV cache would have {blocks} blocks, and "
            f"`max_total_tokens={max_total_tokens}` takes {needed}; change one of them"
        )
    if blocks < needed or blocks > fitting:
        raise ModelLoadError(
            f"Not enough memory to handle `max_total_tokens={max_total_tokens}`: the KV cache "
            f"would have {blocks} blocks of {bytes_per_block} bytes, such a text takes {needed}, "
            f"and {max(0, room)} bytes are free"
        )
    return blocks


def most_tokens(
    num_blocks: int, block_size: int, max_total_tokens: int, form: BlockForm | None
) -> int:
    """The most tokens that fit into a cache at the same time.

    Where layers with a window have blocks of their own, these are tokens of the longest sequences;
    of shorter ones, fewer fit.
    """
    if form is None:
        return num_blocks * block_size
    usable = num_blocks - NUM_PADDING
    return max_total_tokens * usable // form.num_blocks(max_total_tokens)
