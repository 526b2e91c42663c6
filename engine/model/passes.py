"""Makes a loaded model faster; a change is kept only if the model's logits stay what they are."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress

import torch
from torch import nn
from tqdm import tqdm

from ..attention.deferred_rope import defer_rotation, restore_rotation
from ..attention.kv_cache import KVCache
from ..attention.paged import (
    AttentionBackend,
    ReferenceAttention,
    RotaryBackend,
)
from ..batch.model_input import AttentionInput
from ..kernels.cpu import CpuKernels
from ..kernels.packed_linear import pack_model
from ..protocol.errors import ModelLoadError, first_line
from . import fusion, projections, quantization, residual_norms, rope_tables
from .activations import activate_by_kernel
from .experts import pack_mixtures
from .latents import pack_latents
from .layers import layers_read_by
from .loaded import LoadedModel
from .routers import multiply_by_kernel
from .self_check import (
    SELF_CHECK_TOKENS,
    objection,
    objection_to_change,
    paged_logits,
    reference_logits,
)
from .state_kernels import compute_by

logger = logging.getLogger(__name__)


# As a share of the logits' standard deviation. int4 has 0.15 in the bundled model, and 0.4 in one
# with random weights.
_MAX_QUANTIZATION_ERROR = 0.9
_MOST_WEIGHTS = 0.5  # share of the weights; who quantises expects more of them to be


def fuse_rotation(loaded: LoadedModel, backend: AttentionBackend) -> bool:
    """Makes a backend rotate query and key, if it can and the logits stay the same within rounding.

    Returns:
        Whether the backend rotates them now.
    """
    if not isinstance(backend, RotaryBackend):
        return False
    expected = reference_logits(loaded)
    if not defer_rotation(loaded.model):
        return False
    reason = objection(loaded, backend, expected)
    if reason is not None:
        logger.debug("the model rotates query and key itself: %s", reason)
        restore_rotation(loaded.model)
    return reason is None


def fuse_layers(loaded: LoadedModel) -> None:
    """Replaces norms and gated MLPs by fused ones, if the logits stay the same within rounding.

    Raises:
        ModelLoadError: there is not enough memory to merge weights.
    """
    kernels = fusion.kernels_for_fusion(loaded.device, loaded.dtype)
    if kernels is None:
        return
    reference_logits(loaded)
    try:
        fused = fusion.fuse(loaded.model, kernels)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory to merge layers: {first_line(error)}") from error
    reason = objection_to_change(loaded)
    if reason is None:
        logger.info("fused %d norms and %d MLPs", fused.num_norms, fused.num_mlps)
    else:
        logger.warning("norms and MLPs stay as they are: %s", reason)
        fused.undo()
    del fused  # frees the weights that only the replaced layers have
    _free_unused_memory(loaded)


def merge_projections(loaded: LoadedModel) -> None:
    """Makes query, key and value one product, if the logits stay the same within rounding.

    Raises:
        ModelLoadError: there is not enough memory to merge weights.
    """
    reference_logits(loaded)
    try:
        merging = projections.merge_projections(loaded.model)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory to merge layers: {first_line(error)}") from error
    if not merging.num_merged:
        return
    reason = objection_to_change(loaded)
    if reason is None:
        logger.info("merged query, key and value in %d layers", merging.num_merged)
    else:
        logger.warning("query, key and value stay three products: %s", reason)
        merging.undo()
    del merging
    _free_unused_memory(loaded)


def merge_residuals(loaded: LoadedModel) -> None:
    """Makes additions and the norms after them one kernel, if the logits stay the same."""
    reference_logits(loaded)
    merging = residual_norms.merge_residuals(loaded.model)
    if not merging.layers:
        return
    reason = objection_to_change(loaded)
    if reason is None:
        logger.info("merged additions and norms in %d layers", len(merging.layers))
    else:
        logger.warning("additions and norms stay apart: %s", reason)
        merging.undo()


def use_rotary_tables(loaded: LoadedModel, num_positions: int) -> str | None:
    """Replaces the computation of the rotary embedding by tables, if the logits stay the same.

    Returns:
        What is computed otherwise than by transformers, if anything.
    """
    model = loaded.model
    reference_logits(loaded)
    like = torch.empty(0, dtype=loaded.dtype, device=loaded.device)
    tables = rope_tables.tabulate_rotary(model, like, SELF_CHECK_TOKENS)
    if not tables:
        return None
    reason = objection_to_change(loaded)
    if reason is not None:
        logger.warning("the rotary embedding is computed in every step: %s", reason)
        rope_tables.restore_rotary(model)
        return None
    num_positions = max(num_positions, SELF_CHECK_TOKENS)
    are_unchanged = [table.extend(num_positions) for table in tables]
    _free_unused_memory(loaded)
    if all(are_unchanged):
        return None
    note = (
        f"the rotary embedding depends on a text's length: every text has that of {num_positions} "
        "tokens, so the answers to short ones differ from those of transformers' generate"
    )
    logger.warning("%s", note)
    return note


@torch.inference_mode()
def warm_up(
    loaded: LoadedModel, backend: AttentionBackend, block_size: int, cache_dtype: torch.dtype
) -> None:
    """Runs a step of each kind for which a backend may have to compile kernels.

    Steps differ in whether sequences have one token each, and in the width of the block table.
    """
    cache = KVCache(loaded.layers, 1, block_size, cache_dtype, loaded.device)
    for num_tokens, max_context in tqdm([(1, 1), (1, 4096), (2, 1), (2, 4096)], desc="warming up"):
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=loaded.device)
        batch = AttentionInput(
            slot_mapping=positions,
            block_tables=positions.new_zeros(1, -(-max_context // block_size)).int(),
            query_start_loc=torch.tensor([0, num_tokens], device=loaded.device).int(),
            context_lens=torch.tensor([1], device=loaded.device).int(),
        )
        loaded.logits(positions, positions, cache.layers, batch, backend)


def layers_in_use(loaded: LoadedModel) -> frozenset[nn.Module]:
    """The linear layers whose weight the model reads itself: they cannot be replaced."""
    read = layers_read_by(loaded.model, lambda: paged_logits(loaded, ReferenceAttention()))
    if read:
        logger.info("%d linear layers stay, whose weights the model reads itself", len(read))
    return read


def quantize_model(loaded: LoadedModel, left: Collection[nn.Module] = ()) -> str | None:
    """Quantises a model's weights as its scheme says; without a scheme it does nothing.

    Checks with small tolerances must come before: rounded activations enlarge small differences.
    Here logits only must not change too much.

    Args:
        loaded: the model.
        left: layers that stay as they are.

    Returns:
        Which share of the weights is quantised; None without a scheme.

    Raises:
        ModelLoadError: the scheme does not run on this device, or changes the logits too much.
    """
    if loaded.scheme is None:
        return None
    setting = loaded.scheme.setting
    expected = reference_logits(loaded)
    try:
        shares = quantization.apply(loaded.model, loaded.scheme, left)
        actual = paged_logits(loaded, ReferenceAttention())
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory for {setting}: {error}") from error
    except Exception as error:  # the device or this version of torch may lack an operation
        raise ModelLoadError(f"{setting} does not run here: {first_line(error)}") from error
    change = float((actual - expected).std() / expected.std())
    loaded.known.latest = actual
    if not change <= _MAX_QUANTIZATION_ERROR:  # also when it is not a number
        raise ModelLoadError(f"{setting} spoils this model: its logits change by {change:.0%}")
    logger.info("logits change by %.1f %% of their spread", 100 * change)
    _free_unused_memory(loaded)
    note = _shares_note(shares, loaded.dtype)
    if experts := _num_in_experts(loaded.model):
        note += f" ({experts / 1e6:,.1f} million of them in experts of mixtures)"
    if sum(shares.values()) < _MOST_WEIGHTS:
        logger.warning("%s", note)
    return note


def _shares_note(shares: Mapping[str, float], rest: torch.dtype) -> str:
    """How much of the weights is in which format; the output layer may have another."""
    (first, share), *others = sorted(shares.items(), key=lambda item: item[1], reverse=True)
    note = f"{share:.0%} of the weights are quantised to {first}"
    note += "".join(f", {part:.0%} to {name}" for name, part in others)
    return f"{note}, {1 - sum(shares.values()):.0%} stay {rest}"


def _num_in_experts(model: nn.Module) -> int:
    """How many weights are in matrices of experts, [num_experts, out, in]."""
    return sum(
        parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.Conv1d)  # of a state space model
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    )


def pack_layers(loaded: LoadedModel, kernels: CpuKernels, left: Collection[nn.Module] = ()) -> None:
    """Packs linear layers and mixtures for the CPU kernels, which frees their original weights.

    Args:
        loaded: the model; some of its layers may be quantised already.
        kernels: for which they are packed.
        left: layers that stay as they are.

    Raises:
        ModelLoadError: the model does not compute with them what it did before.
    """
    reference_logits(loaded)
    num_mixtures = pack_mixtures(loaded.model, kernels)
    num_routers = multiply_by_kernel(loaded.model, kernels, left)
    if num_mixtures or num_routers:
        logger.info("packed the experts of %d layers, and %d routers", num_mixtures, num_routers)
    pack_latents(loaded.model, kernels)
    if loaded.recurrence is not None:
        compute_by(loaded.recurrence, kernels)
    with suppress(Exception):  # if it does not run any more, the check says why
        activate_by_kernel(
            loaded.model, kernels, lambda: paged_logits(loaded, ReferenceAttention())
        )
    pack_model(loaded.model, kernels, left)
    reason = objection_to_change(loaded, exact=loaded.scheme is None)
    if reason is not None:
        raise ModelLoadError(f"{type(loaded.model).__name__} cannot be packed: {reason}")


def _free_unused_memory(loaded: LoadedModel) -> None:
    """Returns memory that torch keeps to the device, whose free memory the KV cache gets."""
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
