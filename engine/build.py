"""Builds an engine from its configuration; no other module knows all its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from .adapters.adapted_forward import AdaptedForward, SlottedForward
from .adapters.adapted_layers import AdaptedLayers, check_updates
from .adapters.bank import AdapterBank
from .adapters.loader import AdapterLoader
from .adapters.other_ranks import OtherRanks
from .adapters.peft_directory import describe_adapter, read_adapter
from .adapters.segmented_updates import Capacity, segmented_agrees
from .attention.kv_cache import KVCache, bytes_per_block
from .attention.paged import ReferenceAttention
from .batch.recorded_rows import TableWidths
from .block_form import BlockForm, choose_form
from .engine import Engine
from .executor import Executor, Forward
from .grammar.compiler import GrammarCompiler
from .grammar.constraints import Constraints
from .grammar.masks import TokenMasks
from .heartbeat import Activity
from .images.encoder import ImageEncoder
from .images.step_images import StepImages
from .kernels import cpu as cpu_kernels
from .kernels.late_compilation import warn_of_compilations
from .memory import cache_size
from .memory.held import held_by
from .memory.worst_step import StepBounds
from .model.image_part import sees_whole_images, takes_images
from .model.loaded import LoadedModel
from .model.loading import load_model
from .model.model_runner import ModelRunner
from .model.prepare import LoadModel, PreparedModel, native_kernels, prepare
from .model.source import load_tokenizer
from .protocol.config import EngineConfig, EngineInfo, RankMemory
from .protocol.errors import AdapterError, GrammarError, ModelLoadError
from .protocol.processors import num_processors
from .recurrent.layer_state import StatePool, bytes_per_slot
from .recurrent.recurrence import Recurrence
from .replay.cpu_graphs import CpuGraphs
from .replay.cuda_graphs import CudaGraphs, cuda_recorder
from .replay.shapes import recorded_shapes
from .sampling.watermark import Watermark
from .scheduling.block_manager import BlockManager
from .scheduling.scheduler import Scheduler
from .scheduling.state_blocks import StateBlockManager, copy_interval
from .scheduling.state_slots import StateSlots
from .scheduling.window_blocks import WindowBlockManager
from .shards.group import Group
from .shards.shared_forward import SharedForward

logger = logging.getLogger(__name__)

# Estimated from the arithmetic of a typical model: a chunk takes as long as ten decode steps on a
# CPU, as five on a GPU.
_CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
_MIN_CHUNK_TOKENS = {"cpu": 32, "cuda": 512}  # a GPU takes hardly longer for these than for one
_MAX_CPU_GRAPH_TOKENS = 64  # in larger steps a CPU computes for ten times as long as Python takes
_NUM_SLOTS = 8  # adapters on the device, and those that can be loaded, unless settings say more
_NUM_LOADED = 32
_MAX_LOGPROB_ROWS = 256  # of prompts, in a step; each takes the logits of a whole vocabulary


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


@dataclass(frozen=True, slots=True)
class Computation:
    """What computes the steps of an engine; each rank has one.

    `config` is what the model allows of the engine's; `ranks` is what each rank keeps in memory.
    `forward` takes steps whose rows have slots of adapters; `graphs` is the part of it that replays
    recorded steps, None if none are recorded.
    """

    config: EngineConfig
    model: PreparedModel
    runner: ModelRunner
    forward: Forward
    graphs: CpuGraphs | CudaGraphs | None
    bounds: StepBounds
    vocab_size: int
    watermark: Watermark
    adapters: AdapterBank | None
    ranks: tuple[RankMemory, ...]

    def num_replays(self) -> int:
        """How many steps were replayed so far."""
        return 0 if self.graphs is None else self.graphs.num_replays


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
        _slotted(forward, built.adapters),
        _scheduler(built, encoder),
        steps_begin_on,
        vocab_size=built.vocab_size,
        max_total_tokens=max_total_tokens,
        watermark=built.watermark,
        constraints=_constraints(config, built.model.loaded, built.vocab_size),
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


def build_computation(
    config: EngineConfig, load: LoadModel | None = None, group: Group | None = None
) -> Computation:
    """Loads the model and sizes the cache: all that is needed to compute steps.

    Args:
        config: the engine's configuration.
        load: loads a model that is no checkpoint.
        group: the ranks that compute the model together. All of them call this at the same time.

    Raises:
        ModelLoadError: the model cannot be served with this configuration.
    """
    torch.set_num_threads(config.num_threads or _processors_of_rank(config))
    looks = (partial(_check_adapters, config),) if config.adapters else ()
    model = prepare(config, load or partial(load_model, group=group, looks=looks))
    if model.loaded.recurrence is not None:
        config = _for_states(config, model.loaded, model.loaded.recurrence)
    device = model.loaded.device
    vocab_size = int(model.loaded.model.config.get_text_config().vocab_size)
    watermark = Watermark(
        vocab_size, device, gamma=config.watermark_gamma, delta=config.watermark_delta
    )
    if group is not None and group.exchange is None:  # what torch exchanges by is not recorded
        config = replace(config, graph_sizes=())
    adapters = _adapters(config, model.loaded, group)
    bounds = _bounds(config, model, adapters)
    runner = _runner(config, model, bounds, watermark, adapters, group)
    forward = _adapted(runner.forward, adapters)
    capacity = None if adapters is None else adapters.layers.capacity
    graphs = _recorded_steps(config, runner, forward, bounds, vocab_size, capacity)
    return Computation(
        config,
        model,
        runner,
        graphs or forward,
        graphs,
        bounds,
        vocab_size,
        watermark,
        adapters,
        _held(model, runner, group),
    )


def _held(model: PreparedModel, runner: ModelRunner, group: Group | None) -> tuple[RankMemory, ...]:
    """What each rank keeps in memory, in their order."""
    own = held_by(model.loaded.model, runner.cache)
    if group is None:
        return (own,)
    return tuple(RankMemory(*numbers) for numbers in group.gather(torch.tensor(own)).tolist())


def _processors_of_rank(config: EngineConfig) -> int:
    return max(1, num_processors() // config.num_shards)


def _for_states(config: EngineConfig, loaded: LoadedModel, recurrence: Recurrence) -> EngineConfig:
    """The configuration of a model that keeps a state beside the KV cache.

    Layers that get texts token by token would take longer for what follows a shared prefix than for
    the whole text, and their recorded steps gave other last bits. On a GPU steps are not recorded:
    they have padding rows, which have no state.
    """
    is_slow, is_shared = recurrence.token_by_token, config.enable_prefix_caching
    if is_slow and is_shared:
        logger.warning("no prefix caching: the model's layers go on with a text token by token")
    sizes = () if is_slow or loaded.device.type == "cuda" else config.graph_sizes
    return replace(config, enable_prefix_caching=is_shared and not is_slow, graph_sizes=sizes)


def _bounds(config: EngineConfig, model: PreparedModel, adapters: AdapterBank | None) -> StepBounds:
    loaded = () if adapters is None else adapters.listed()
    return StepBounds(
        max_total_tokens=model.max_total_tokens,
        max_step_tokens=config.max_step_tokens,
        max_num_seqs=config.max_num_seqs,
        max_logprob_rows=_MAX_LOGPROB_ROWS,
        max_draft_tokens=config.speculate,
        block_size=config.block_size,
        adapter=loaded[0].digest if loaded else "",
        state_slot=None if model.loaded.recurrence is None else 0,
        form=_form(config, model),
    )


def _form(config: EngineConfig, model: PreparedModel) -> BlockForm | None:
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


def _adapters(config: EngineConfig, loaded: LoadedModel, group: Group | None) -> AdapterBank | None:
    """The adapters, and places for more; None where there are none and will be none.

    Raises:
        ModelLoadError: an adapter does not fit the model, or ranks have read different ones.
    """
    if not config.adapters and config.adapter_directory is None:
        return None
    num_slots = config.max_loras or max(_NUM_SLOTS, len(config.adapters))
    layers = AdaptedLayers(
        loaded,
        num_slots,
        native_kernels(config, loaded),
        is_segmented=_has_segmented_updates(config, loaded),
        rounds_to=None if config.lora_dtype is None else getattr(torch, config.lora_dtype),
    )
    max_loaded = config.max_cpu_loras or max(_NUM_LOADED, num_slots)
    bank = AdapterBank(layers, max_loaded, AdapterLoader(layers, config.adapter_directory))
    for name, source in config.adapters:
        try:
            bank.add(name, source, layers.fit(read_adapter(name, source)))
        except AdapterError as error:
            raise ModelLoadError(str(error)) from error
        if group is not None and not group.agrees(bytes.fromhex(bank.digest(name))):
            raise ModelLoadError(f"adapter {name}: its files change while they are read")
        layers.check(name, bank.slots((bank.digest(name),))[0])
    return bank


def _check_adapters(config: EngineConfig, model: PreTrainedModel) -> None:
    """Checks that the adapters of the start fit a model, whose weights may have shapes alone.

    Raises:
        ModelLoadError: one does not.
    """
    for name, source in config.adapters:
        check_updates(describe_adapter(name, source), model)


def _has_segmented_updates(config: EngineConfig, loaded: LoadedModel) -> bool:
    """Whether a Triton kernel computes the updates of adapters."""
    if not config.enable_native_kernels or loaded.device.type == "cpu":
        return False
    return segmented_agrees(torch.empty(0, dtype=loaded.dtype, device=loaded.device))


def _adapted(forward: Forward, adapters: AdapterBank | None) -> Forward:
    """A forward whose steps may have rows with slots of adapters."""
    return forward if adapters is None else AdaptedForward(forward, adapters.layers.step)


def _slotted(forward: Forward, adapters: AdapterBank | None) -> Forward:
    """A forward whose steps may have rows with adapters."""
    if adapters is None:
        return forward
    return SlottedForward(forward, adapters, needs_all_rows=adapters.layers.needs_all_rows)


def _runner(
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
    forward = _slotted(_adapted(runner.forward, adapters), adapters)
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
        notes=(*model.notes, *_missing_recordings(built.graphs)),
    )


def _missing_recordings(graphs: CpuGraphs | CudaGraphs | None) -> tuple[str, ...]:
    """What to tell of steps that were to be recorded and are not: decoding is slower without."""
    if not isinstance(graphs, CudaGraphs) or not graphs.num_missing:
        return ()
    return (f"steps of {graphs.num_missing} sizes could not be recorded: they wait for Python",)


def _recorded_steps(
    config: EngineConfig,
    runner: ModelRunner,
    forward: Forward,
    bounds: StepBounds,
    vocab_size: int,
    capacity: Capacity | None,
) -> CpuGraphs | CudaGraphs | None:
    """The model's forward with small steps replayed from graphs, where that is possible."""
    if runner.device.type == "cuda":
        return _cuda_graphs(config, runner, forward, bounds, vocab_size, capacity)
    return _cpu_graphs(config, runner, forward, bounds)


def _cuda_graphs(
    config: EngineConfig,
    runner: ModelRunner,
    forward: Forward,
    bounds: StepBounds,
    vocab_size: int,
    capacity: Capacity | None,
) -> CudaGraphs | None:
    """The model's forward with small steps recorded; only our own kernels can be recorded."""
    shapes = recorded_shapes(config)
    if not shapes or isinstance(runner.backend, ReferenceAttention):
        return None
    graphs = CudaGraphs(
        forward,
        shapes,
        widths=TableWidths.of(bounds.max_total_tokens, config.block_size, bounds.form),
        vocab_size=vocab_size,
        device=runner.device,
        adapter_rank=None if capacity is None else lambda: capacity.rank,
    )
    graphs.record(cuda_recorder(runner.device))
    return graphs


def _cpu_graphs(
    config: EngineConfig, runner: ModelRunner, forward: Forward, bounds: StepBounds
) -> CpuGraphs | None:
    """The model's forward with small steps replayed, if attention uses our own kernels."""
    max_tokens = min(max(config.graph_sizes, default=0), _MAX_CPU_GRAPH_TOKENS)
    if not max_tokens or not isinstance(runner.backend, cpu_kernels.CpuKernels):
        return None
    widths = TableWidths.of(bounds.max_total_tokens, config.block_size, bounds.form)
    graphs = CpuGraphs(
        forward,
        runner.backend,
        max_tokens=max_tokens,
        widths=widths,
        clear_state=None if runner.pool is None else runner.pool.clear,
    )
    graphs.verify(bounds.max_total_tokens - 1, config.block_size, bounds.form)
    return graphs


def _constraints(config: EngineConfig, loaded: LoadedModel, vocab_size: int) -> Constraints | None:
    """Grammars, which need a fast tokenizer to know how tokens are spelt; None without one.

    What every grammar needs is built now, for the tokens that usually end a text.
    """
    try:
        tokenizer = load_tokenizer(config)
    except Exception:  # a broken one can fail in any way; the service, which needs it, says why
        tokenizer = None
    if tokenizer is None or not tokenizer.is_fast:
        logger.warning("%s has no fast tokenizer: no grammars", config.model_id)
        return None
    compiler = GrammarCompiler(tokenizer.backend_tokenizer.to_str(), vocab_size)
    try:
        compiler.warm(_eos_token_ids(loaded, tokenizer.eos_token_id, vocab_size))
    except GrammarError as error:
        logger.warning("%s", error)
    return Constraints(compiler, TokenMasks(vocab_size))


def _eos_token_ids(loaded: LoadedModel, own: int | None, vocab_size: int) -> frozenset[int]:
    """The tokens that end a text, as the service finds them: a list of the model's, or both."""
    listed = getattr(loaded.model.generation_config, "eos_token_id", None)
    known = listed if isinstance(listed, list) else [listed, own]
    return frozenset(index for index in known if isinstance(index, int) and index < vocab_size)
