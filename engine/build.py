"""Builds an engine from its configuration: what computes its steps, and what decides of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .adapters.other_ranks import OtherRanks
from .computation.adapters import slotted
from .computation.computation import Computation, build_computation
from .computation.recorded_steps import missing_recordings
from .engine import Engine
from .executor import Forward
from .grammar.model_constraints import constraints_of
from .heartbeat import Activity
from .images.encoder import ImageEncoder
from .images.step_images import StepImages
from .kernels.late_compilation import warn_of_compilations
from .memory import cache_size
from .memory.worst_step import StepBounds
from .model.image_part import sees_whole_images, takes_images
from .model.loaded import LoadedModel
from .model.model_runner import ModelRunner
from .model.prepare import LoadModel
from .protocol.config import EngineConfig, EngineInfo
from .scheduling.block_manager import BlockManager
from .scheduling.scheduler import Scheduler
from .scheduling.state_blocks import StateBlockManager, copy_interval
from .scheduling.state_slots import StateSlots
from .scheduling.window_blocks import WindowBlockManager
from .shards.group import Group
from .shards.shared_forward import SharedForward

# Estimated from the arithmetic of a typical model: a chunk takes as long as ten decode steps on a
# CPU, as five on a GPU.
_CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
_MIN_CHUNK_TOKENS = {"cpu": 32, "cuda": 512}  # a GPU takes hardly longer for these than for one


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that compute a model together, as the first of them sees them.

    Attributes:
        group: through which layers exchange results.
        lead: makes of this rank's forward pass one that all ranks compute.
        others: are told which adapters to have.
    """

    group: Group
    lead: Callable[[Forward], Forward]
    others: OtherRanks


def build_engine(
    config: EngineConfig,
    load: LoadModel | None = None,
    activity: Activity | None = None,
    ranks: Ranks | None = None,
) -> tuple[Engine, EngineInfo]:
    """Loads the model, sizes the cache and returns an engine that is ready for requests.

    Args:
        config: the engine's configuration.
        load: loads a model that is no checkpoint.
        activity: where the engine notes what it does.
        ranks: with which this process computes the model; None to compute it alone.

    Raises:
        ModelLoadError: the model cannot be served with this configuration.
    """
    built = build_computation(config, load, None if ranks is None else ranks.group)
    config = built.config
    device, max_total_tokens = built.model.loaded.device, built.model.max_total_tokens
    steps_begin_on = device if ranks is None else torch.device("cpu")
    encoder = _encoder(config, built.model.loaded)
    forward = built.forward
    if ranks is not None:
        forward = ranks.lead(SharedForward(forward, ranks.group, device))
    if ranks is not None and built.adapters is not None:
        built.adapters.lead(ranks.others)
    engine = Engine(
        slotted(forward, built.adapters),
        _scheduler(built, encoder),
        steps_begin_on,
        vocab_size=built.vocab_size,
        max_total_tokens=max_total_tokens,
        watermark=built.watermark,
        constraints=constraints_of(config, built.model.loaded, built.vocab_size),
        adapters=built.adapters,
        images=_step_images(encoder, built.model.loaded, steps_begin_on),
        runs_ahead=device.type == "cuda" if config.run_ahead is None else config.run_ahead,
        leads_ranks=ranks is not None,
        num_replays=built.num_replays,
        activity=activity,
    )
    if device.type == "cuda":
        warn_of_compilations()
    num_tokens = cache_size.most_tokens(
        built.runner.cache.num_blocks, config.block_size, max_total_tokens, built.bounds.form
    )
    info = _info(built, num_tokens)
    return engine, replace(info, takes_images=encoder is not None, ranks=built.ranks)


def _encoder(config: EngineConfig, loaded: LoadedModel) -> ImageEncoder | None:
    """What encodes images; None for models that take none."""
    if not takes_images(loaded.model):
        return None
    return ImageEncoder(loaded.model, config.image_cache_bytes)


def _step_images(
    encoder: ImageEncoder | None, loaded: LoadedModel, device: torch.device
) -> StepImages | None:
    if encoder is None:
        return None
    return StepImages(encoder, device, are_whole=sees_whole_images(loaded.model))


def _scheduler(built: Computation, encoder: ImageEncoder | None) -> Scheduler:
    config, bounds, runner, adapters = built.config, built.bounds, built.runner, built.adapters
    max_num_seqs = bounds.max_num_seqs
    return Scheduler(
        _blocks(config, bounds, runner),
        max_step_tokens=bounds.max_step_tokens,
        max_num_seqs=max_num_seqs if runner.pool is None else runner.pool.num_seqs,
        max_chunk_tokens=config.max_chunk_tokens or _CHUNK_TOKENS[runner.device.type],
        min_chunk_tokens=_MIN_CHUNK_TOKENS[runner.device.type],
        max_logprob_rows=bounds.max_logprob_rows,
        max_draft_tokens=bounds.max_draft_tokens,
        max_adapters=0 if adapters is None else adapters.max_resident,
        max_image_tokens=config.max_step_image_tokens,
        is_encoded=lambda digest: encoder is not None and encoder.has(digest),
        keeps_images=encoder is not None and sees_whole_images(built.model.loaded.model),
    )


def _blocks(config: EngineConfig, bounds: StepBounds, runner: ModelRunner) -> BlockManager:
    num_blocks, is_shared = runner.cache.num_blocks, config.enable_prefix_caching
    if bounds.form is not None:
        return WindowBlockManager(
            num_blocks, bounds.form, bounds.max_step_tokens, enable_prefix_caching=is_shared
        )
    if runner.pool is None:
        return BlockManager(num_blocks, config.block_size, enable_prefix_caching=is_shared)
    num_copies = runner.pool.num_copies
    return StateBlockManager(
        num_blocks,
        config.block_size,
        StateSlots(runner.pool.num_slots, num_copies),
        interval=copy_interval(bounds.max_total_tokens, config.block_size, num_copies),
        enable_prefix_caching=is_shared and num_copies > 0,
    )


def _info(built: Computation, max_batch_total_tokens: int) -> EngineInfo:
    config, model, adapters = built.config, built.model, built.adapters
    loaded = model.loaded
    return EngineInfo(
        model_id=config.model_id,
        model_sha=getattr(loaded.model.config, "_commit_hash", None),
        dtype=str(loaded.dtype) if config.dtype is None else f"torch.{config.dtype}",
        device=loaded.device.type,
        vocab_size=built.vocab_size,
        max_total_tokens=model.max_total_tokens,
        max_batch_total_tokens=max_batch_total_tokens,
        block_size=config.block_size,
        attention=model.attention,
        adapters=() if adapters is None else adapters.listed(),
        max_adapters=0 if adapters is None else adapters.max_loaded,
        loads_adapters=config.adapter_directory is not None,
        notes=(*model.notes, *missing_recordings(built.graphs)),
    )
