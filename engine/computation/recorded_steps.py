"""Small steps replayed from recordings, where device, kernels and settings allow that."""

from __future__ import annotations

from ..adapters.segmented_updates import Capacity
from ..attention.paged import ReferenceAttention
from ..batch.recorded_rows import TableWidths
from ..executor import Forward
from ..kernels.cpu import CpuKernels
from ..memory.worst_step import StepBounds
from ..model.model_runner import ModelRunner
from ..protocol.config import EngineConfig
from ..replay.cpu_graphs import CpuGraphs
from ..replay.cuda_graphs import CudaGraphs, cuda_recorder
from ..replay.shapes import recorded_shapes

_MAX_CPU_GRAPH_TOKENS = 64  # in larger steps a CPU computes for ten times as long as Python takes


def recorded_steps(
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
    if not max_tokens or not isinstance(runner.backend, CpuKernels):
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


def missing_recordings(graphs: CpuGraphs | CudaGraphs | None) -> tuple[str, ...]:
    """What to tell of steps that were to be recorded and are not: decoding is slower without."""
    if not isinstance(graphs, CudaGraphs) or not graphs.num_missing:
        return ()
    return (f"steps of {graphs.num_missing} sizes could not be recorded: they wait for Python",)
