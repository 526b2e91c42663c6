"""What computes the steps of an engine; each rank of a divided model has one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..adapters.bank import AdapterBank
from ..executor import Forward
from ..memory.held import held_by
from ..memory.worst_step import StepBounds
from ..model.loaded import LoadedModel
from ..model.loading import load_model
from ..model.model_runner import ModelRunner
from ..model.prepare import LoadModel, PreparedModel, prepare
from ..protocol.config import EngineConfig, RankMemory
from ..protocol.processors import num_processors
from ..recurrent.recurrence import Recurrence
from ..replay.cpu_graphs import CpuGraphs
from ..replay.cuda_graphs import CudaGraphs
from ..sampling.watermark import Watermark
from ..shards.group import Group
from .adapters import adapted, adapter_bank, check_adapters
from .recorded_steps import recorded_steps
from .sized_runner import sized_runner
from .window_form import window_form

logger = logging.getLogger(__name__)

_MAX_LOGPROB_ROWS = 256  # of prompts, in a step; each takes the logits of a whole vocabulary


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
    looks = (partial(check_adapters, config),) if config.adapters else ()
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
    adapters = adapter_bank(config, model.loaded, group)
    bounds = _bounds(config, model, adapters)
    runner = sized_runner(config, model, bounds, watermark, adapters, group)
    forward = adapted(runner.forward, adapters)
    capacity = None if adapters is None else adapters.layers.capacity
    graphs = recorded_steps(config, runner, forward, bounds, vocab_size, capacity)
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
        form=window_form(config, model),
    )
