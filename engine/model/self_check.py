"""Compares logits: on the paged attention with transformers' own, with kernels and without."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention.kv_cache import KVCache
from ..attention.latent import absorb
from ..attention.paged import (
    IMPLEMENTATION,
    AttentionBackend,
    ReferenceAttention,
    install,
)
from ..batch.model_input import AttentionInput, SequenceState, StateRows
from ..protocol.errors import ModelLoadError, first_line
from ..recurrent.find import FoundLayers, watching
from ..recurrent.recurrence import Recurrence, StepStates
from . import architecture
from .attention_probe import probe_layers
from .load_failure import with_fields
from .loaded import LoadedModel
from .older.interface import use_interface
from .step_positions import asks_positions

logger = logging.getLogger(__name__)

_ONE_THREAD = 1e9  # multiply-adds of a text that one thread computes: 50 ms
SELF_CHECK_TOKENS = 19  # more than a block of 16, so that the check crosses the end of a block
_LONG_CHECK_TOKENS = 300  # more than one split of a GPU kernel's keys
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3}  # of logits: a share of their standard deviation
# The same in fp16 and bf16, as a number of roundings: 32 random layers of the 8B shape in bfloat16
# differ by 6 (0.05), from transformers' own attention and between kernels.
_SELF_CHECK_ROUNDINGS = 20
_LARGEST_DIFFERENCE = 1.0  # of a model that still computes the same thing; another one has 1.4


def attach_paged_attention(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> LoadedModel:
    """Makes a model use the paged attention, and compares its logits with those it had before.

    Raises:
        ModelLoadError: the architecture is not supported.
    """
    name = type(model).__name__
    install()
    use_interface(model)
    with _running(model), watching(model) as found:
        expected = stock_logits(model, use_cache=True)
    if not torch.isfinite(expected).all():
        raise ModelLoadError(f"{name} computes logits that are not finite{_cause(model)}")
    reason = architecture.refusal(model, found.stateful)
    if reason is not None:
        raise ModelLoadError(f"{name} is not supported: {reason}")
    with _running(model):
        loaded = _attached(model, found, device, dtype)
        difference = relative_difference(reference_logits(loaded), expected)
        if loaded.recurrence is not None and not difference <= tolerance(dtype):
            loaded.recurrence.token_by_token = True
            loaded.known.forget()
            difference = relative_difference(reference_logits(loaded), expected)
    if not difference <= tolerance(dtype):  # also when it is not a number
        raise ModelLoadError(
            f"{name} is not supported: its logits on paged attention differ by {difference:.2%}"
        )
    return loaded


def _cause(model: nn.Module) -> str:
    """Which weights are not finite, if any are."""
    for name, weights in model.named_parameters():
        if not torch.isfinite(weights.float()).all():
            return f": {name} has values that are not"
    return f" in {str(next(model.parameters()).dtype)[6:]}, though all its weights are"


@contextmanager
def _running(model: PreTrainedModel) -> Iterator[None]:
    """Within it any error of a model's code means that the model cannot be served."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        reason = with_fields(error, model.config.to_dict())
        raise ModelLoadError(
            f"{type(model).__name__} does not run on paged attention: {reason}"
        ) from error


def _attached(
    model: PreTrainedModel, found: FoundLayers, device: torch.device, dtype: torch.dtype
) -> LoadedModel:
    """The model, on the paged attention from now on."""
    stock = str(model.config.get_text_config()._attn_implementation)
    if absorb(model):
        logger.info("the KV cache holds latents, not the keys and values of every head")
    layers, windows = probe_layers(model, _self_check_ids(model, 1), found)
    chunk_sizes = architecture.chunk_sizes(model)
    loaded = LoadedModel(
        model,
        layers,
        device,
        dtype,
        Recurrence(found.stateful) if found.stateful else None,
        chunk_sizes=chunk_sizes,
        windows=windows | chunk_sizes,
        asks_positions=asks_positions(model),
        stock_attention=stock,
    )
    model.set_attn_implementation(IMPLEMENTATION)
    return loaded


def backend_agrees(
    loaded: LoadedModel, backend: AttentionBackend, block_size: int, cache_dtype: torch.dtype
) -> bool:
    """Whether the model's logits with this backend are those with the reference. Logs why not.

    Short and long texts are tried, since a backend may have different kernels for them.
    """
    longest = architecture.num_positions(loaded.model.config, _LONG_CHECK_TOKENS)
    for num_tokens in (SELF_CHECK_TOKENS, min(_LONG_CHECK_TOKENS, longest)):
        trial = _Trial(num_tokens, block_size, cache_dtype)
        expected = paged_logits(loaded, ReferenceAttention(), trial)
        reason = objection(loaded, backend, expected, trial)
        if reason is not None:
            logger.warning("%s is not used: %s", type(backend).__name__, reason)
            return False
    return True


def recomputes_exactly(
    loaded: LoadedModel, backend: AttentionBackend, block_size: int, cache_dtype: torch.dtype
) -> bool:
    """Whether logits are the same, bit for bit, for a text in one step and in several.

    If so, a sequence that is computed again, after a crash or a preemption, continues with the same
    tokens.
    """
    trial = _Trial(SELF_CHECK_TOKENS, block_size, cache_dtype)
    whole = _Trial(SELF_CHECK_TOKENS, block_size, cache_dtype, is_whole=True)
    # With as many threads as steps will have.
    return torch.equal(_paged_logits(loaded, backend, trial), _paged_logits(loaded, backend, whole))


def reference_logits(loaded: LoadedModel) -> Tensor:
    """The `paged_logits` with the reference attention, computed once for several checks in a row.

    They are those from before the latest change of the model, unless `objection_to_change` had
    none: then they are those that it has computed.
    """
    if loaded.known.latest is None:
        loaded.known.latest = paged_logits(loaded, ReferenceAttention())
    return loaded.known.latest


def objection_to_change(loaded: LoadedModel, *, exact: bool = True) -> str | None:
    """Why a model cannot stay as it was changed after a call of `reference_logits`; None if it can.

    Logits that are not `exact`, because layers round their input, only have to be similar.
    """
    before = loaded.known.latest
    assert before is not None, "the logits from before the change are to be known"
    return objection(loaded, ReferenceAttention(), before, exact=exact, is_kept=True)


def objection(
    loaded: LoadedModel,
    backend: AttentionBackend,
    expected: Tensor,
    trial: _Trial | None = None,
    *,
    exact: bool = True,
    is_kept: bool = False,
) -> str | None:
    """Why a backend cannot be used for a model; None if it can.

    Logits that are not `exact`, because layers round their input, only have to be similar. If they
    are, those that are to be kept are what `reference_logits` has from now on.
    """
    try:
        actual = paged_logits(loaded, backend, trial)
    except torch.AcceleratorError:  # the device cannot be used any more
        raise
    except Exception as error:  # for example no working compiler: the model is served without it
        return f"it does not run here: {first_line(error)}"
    difference = relative_difference(actual, expected)
    allowed = tolerance(loaded.dtype) if exact else _LARGEST_DIFFERENCE
    logger.debug("logits differ by %.3f %%, of %.3f %%", 100 * difference, 100 * allowed)
    if difference <= allowed:
        if is_kept:
            loaded.known.latest = actual
        return None
    return f"its logits differ by {difference:.2%}, more than {allowed:.2%}"


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """The worst token's root mean square difference, as a share of all logits' deviation.

    Not the largest difference of a single logit: among half a million numbers in bfloat16 that is a
    quarter of the standard deviation. For a model that computes something else this is 1.4.
    """
    errors = (actual - expected).square().mean(dim=-1).sqrt()
    return float(errors.max()) / (float(expected.std()) or 1.0)


def tolerance(dtype: torch.dtype) -> float:
    """The largest `relative_difference` that rounding explains."""
    roundings = _SELF_CHECK_ROUNDINGS * torch.finfo(dtype).eps
    return _SELF_CHECK_TOLERANCE.get(dtype, roundings)


def _self_check_ids(model: PreTrainedModel, num_tokens: int = SELF_CHECK_TOKENS) -> Tensor:
    """Int64 [1, num_tokens]: ids spread over the vocabulary."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, num_tokens + 1, device=model.device) * 7919 % vocab_size
    return ids.unsqueeze(0)


def one_step_logits(loaded: LoadedModel, backend: AttentionBackend) -> Tensor:
    """Logits of a text of `SELF_CHECK_TOKENS`, computed in one step."""
    return paged_logits(loaded, backend, _Trial(SELF_CHECK_TOKENS, 16, loaded.dtype, is_whole=True))


@dataclass(frozen=True, slots=True)
class _Trial:
    """The number of tokens of a comparison, the format of its cache, whether it is one step."""

    num_tokens: int
    block_size: int
    cache_dtype: torch.dtype
    is_whole: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each step ends: two chunks and a decode step, or one step.

        The chunks of a long text have a size that bounds the memory they take.
        """
        if self.is_whole:
            return (self.num_tokens,)
        chunks = range(_LONG_CHECK_TOKENS, self.num_tokens - _LONG_CHECK_TOKENS, _LONG_CHECK_TOKENS)
        return (11, *chunks, self.num_tokens - 1, self.num_tokens)


@contextmanager
def _few_threads(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """Within it one thread computes, if it has little to compute, on a processor.

    Several wait for each other in every layer. On a busy machine one of them often waits for a
    processor meanwhile, and a check of milliseconds takes seconds.
    """
    num_threads = torch.get_num_threads()
    if num_tokens * sum(parameter.numel() for parameter in model.parameters()) > _ONE_THREAD:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@torch.inference_mode()
def stock_logits(
    model: PreTrainedModel,
    num_tokens: int = SELF_CHECK_TOKENS,
    last: int = 0,
    *,
    use_cache: bool = False,
) -> Tensor:
    """Logits of a text on the model's own attention, float32 [num_tokens, vocab_size].

    `last` is the number of tokens at its end whose logits are wanted; 0 for all.
    """
    ids = _self_check_ids(model, num_tokens)
    options = {"logits_to_keep": last} if last else {}
    with _few_threads(model, num_tokens):
        logits = model(input_ids=ids, use_cache=use_cache, **options).logits
    assert isinstance(logits, Tensor)
    return logits[0, -last:].float()


def paged_logits(
    loaded: LoadedModel, backend: AttentionBackend, trial: _Trial | None = None, last: int = 0
) -> Tensor:
    """Logits over the paged cache, float32 [num_tokens, vocab_size].

    The tokens, those of `stock_logits`, are computed in the steps of the trial; `last` as there.
    """
    trial = trial or _Trial(SELF_CHECK_TOKENS, 16, loaded.dtype)
    with _few_threads(loaded.model, trial.num_tokens):
        return _paged_logits(loaded, backend, trial, last)


@torch.inference_mode()
def _paged_logits(
    loaded: LoadedModel, backend: AttentionBackend, trial: _Trial, last: int = 0
) -> Tensor:
    device = loaded.model.device
    ids = _self_check_ids(loaded.model, trial.num_tokens)[0]
    num_blocks = -(-trial.num_tokens // trial.block_size)
    cache = KVCache(loaded.layers, num_blocks, trial.block_size, trial.cache_dtype, device)
    pool = loaded.state_pool(1)
    first = trial.num_tokens - last if last else 0
    chunks = []
    for start, end in itertools.pairwise((0, *trial.ends)):
        positions = torch.arange(start, end, device=device)
        rows = positions[max(first - start, 0) :] - start
        logits = loaded.logits(
            ids[start:end],
            positions,
            cache.layers,
            _chunk(positions, end, num_blocks),
            backend,
            (rows if len(rows) else rows.new_zeros(1)) if last else None,
            StepStates.of(pool, _one_state(start, end, device)),
        )
        chunks.append(logits[: len(rows)].float())
    return torch.cat(chunks)


def _one_state(start: int, end: int, device: torch.device) -> StateRows:
    """A sequence in slot 0 of which the tokens from `start` on are computed."""
    return StateRows([0, end - start], [SequenceState(0, start == 0)], device)


def difference_of_last(loaded: LoadedModel, num_tokens: int, stock: str) -> float:
    """The `relative_difference` between the paged attention and a model's own, of a text's end.

    Args:
        loaded: the model.
        num_tokens: of the text; its last `SELF_CHECK_TOKENS` are compared.
        stock: the name of the model's own attention.
    """
    model = loaded.model
    try:
        model.set_attn_implementation(stock)
        expected = stock_logits(model, num_tokens, SELF_CHECK_TOKENS)
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    trial = _Trial(num_tokens, 16, loaded.dtype)
    actual = paged_logits(loaded, ReferenceAttention(), trial, SELF_CHECK_TOKENS)
    return relative_difference(actual, expected)


def _chunk(positions: Tensor, end: int, num_blocks: int) -> AttentionInput:
    """A step of a single sequence, whose tokens are in the slots of their positions."""
    device = positions.device
    return AttentionInput(
        slot_mapping=positions,
        block_tables=torch.arange(num_blocks, device=device).int().unsqueeze(0),
        query_start_loc=torch.tensor([0, len(positions)], device=device).int(),
        context_lens=torch.tensor([end], device=device).int(),
    )
