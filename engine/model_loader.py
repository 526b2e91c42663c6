"""Loads a transformers model and proves, before it serves, that our attention gives its logits."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from . import angles, fusion, quantization
from .attention import (
    IMPLEMENTATION,
    AttentionBackend,
    AttentionStep,
    ReferenceAttention,
    RotaryBackend,
    install,
)
from .batch import AttentionInput
from .config import EngineConfig
from .errors import ModelLoadError
from .kv_cache import KVCache, LayerShape
from .rotary import defer_rotation, restore_rotation

logger = logging.getLogger(__name__)

_PROBE = "tokenwire_probe"
_SELF_CHECK_TOKENS = 19  # more than a block, so that the check crosses a block's edge
_LONG_CHECK_TOKENS = 300  # more than a part of the cache that a kernel reads by itself
# Of the logits' spread. int4 comes to 0.15 in the bundled model, to 0.4 in one of random weights.
_MAX_QUANTIZATION_ERROR = 0.9
# Of logits, as a share of their spread. Half formats get so many roundings: 32 random layers of the
# 8B shape in bfloat16 come to 6 (0.05), both from transformers' own attention and among kernels.
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3}
_SELF_CHECK_ROUNDINGS = 20


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run on our attention, and the shapes of its cache.

    `scheme` is what `quantize_model` has to do to it.
    """

    model: PreTrainedModel
    layers: dict[int, LayerShape]
    device: torch.device
    dtype: torch.dtype
    scheme: quantization.Scheme | None = None


def load_model(config: EngineConfig) -> LoadedModel:
    """Loads weights and checks that the model can be served.

    Raises:
        ModelLoadError: the checkpoint is missing or broken, does not fit into memory, or is of an
            architecture that does not run on paged attention. The message is one line.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        model_config = AutoConfig.from_pretrained(
            config.model_id, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        dtype = _choose_dtype(config.dtype, device, model_config)
        scheme = quantization.choose(config, model_config, device, dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.model_id,
            config=model_config,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, report = loaded
        if report["missing_keys"]:  # transformers would fill them with noise and go on
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(report['missing_keys']))}")
        nn.Module.to(model, device)
        nn.Module.eval(model)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory to load {config.model_id}: {error}") from error
    except MemoryError as error:
        raise ModelLoadError(f"not enough memory to load {config.model_id}") from error
    except Exception as error:  # whatever a checkpoint can break ends as one line for its owner
        raise ModelLoadError(f"cannot load {config.model_id}: {_first_line(error)}") from error
    return replace(prepare_model(model, device, dtype), scheme=scheme)


def prepare_model(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Puts a model onto the paged attention, and compares its logits with the stock ones.

    Raises:
        ModelLoadError: the architecture is not supported.
    """
    name = type(model).__name__
    if not model._supports_attention_backend or getattr(model, "_is_stateful", False):
        raise ModelLoadError(
            f"{name} is not supported: it keeps a state that is not a paged KV cache"
        )
    install()
    try:
        expected = _stock_logits(model)
        loaded = LoadedModel(model, _probe_layers(model), device, dtype)
        model.set_attn_implementation(IMPLEMENTATION)
        actual = _paged_logits(loaded, ReferenceAttention())
    except Exception as error:
        raise ModelLoadError(
            f"{name} does not run on paged attention: {_first_line(error)}"
        ) from error
    difference = _difference(actual, expected)
    if not difference <= _tolerance(dtype):  # also when it is not a number
        raise ModelLoadError(
            f"{name} is not supported: its logits on paged attention differ by {difference:.2%}"
        )
    return loaded


def backend_agrees(
    loaded: LoadedModel, backend: AttentionBackend, block_size: int, cache_dtype: torch.dtype
) -> bool:
    """Whether the model has the logits of the reference with this backend. Logs why not.

    Tried are short texts and long ones, for which a backend may have kernels of their own.
    """
    text_config = loaded.model.config.get_text_config()
    longest = int(getattr(text_config, "max_position_embeddings", _LONG_CHECK_TOKENS))
    for num_tokens in (_SELF_CHECK_TOKENS, min(_LONG_CHECK_TOKENS, longest)):
        trial = _Trial(num_tokens, block_size, cache_dtype)
        expected = _paged_logits(loaded, ReferenceAttention(), trial)
        objection = _objection(loaded, backend, expected, trial)
        if objection is not None:
            logger.warning("%s is not used: %s", type(backend).__name__, objection)
            return False
    return True


def fuse_rotation(loaded: LoadedModel, backend: AttentionBackend) -> bool:
    """Lets a backend rotate query and key, if it can and the model's logits stay what they are."""
    if not isinstance(backend, RotaryBackend):
        return False
    expected = _paged_logits(loaded, ReferenceAttention())
    if not defer_rotation(loaded.model):
        return False
    objection = _objection(loaded, backend, expected)
    if objection is not None:
        logger.debug("the rotation stays where it is: %s", objection)
        restore_rotation(loaded.model)
    return objection is None


def fuse_layers(loaded: LoadedModel) -> None:
    """Replaces norms and gated MLPs by faster ones, if the model's logits stay what they are.

    Raises:
        ModelLoadError: there is no memory to do it in.
    """
    forms = fusion.forms_for(loaded.device, loaded.dtype)
    if forms is None:
        return
    expected = _paged_logits(loaded, ReferenceAttention())
    try:
        fused = fusion.fuse(loaded.model, forms)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory to merge layers: {_first_line(error)}") from error
    objection = _objection(loaded, ReferenceAttention(), expected)
    if objection is None:
        logger.info("fused %d norms and %d MLPs", fused.num_norms, fused.num_mlps)
    else:
        logger.warning("norms and MLPs stay as they are: %s", objection)
        fused.undo()
    del fused  # and the weights in it that nobody else has
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # the cache is sized by what the device has free


def use_angle_tables(loaded: LoadedModel, num_positions: int) -> None:
    """Has angles looked up that the model computes, if its logits stay what they are."""
    model = loaded.model
    expected = _paged_logits(loaded, ReferenceAttention())
    like = torch.empty(0, dtype=loaded.dtype, device=loaded.device)
    tables = angles.tabulate_angles(model, like, _SELF_CHECK_TOKENS)
    if not tables:
        return
    objection = _objection(loaded, ReferenceAttention(), expected)
    if objection is not None:
        logger.warning("angles are computed in every step: %s", objection)
        angles.restore_angles(model)
        return
    num_positions = max(num_positions, _SELF_CHECK_TOKENS)
    stay = [table.extend(num_positions) for table in tables]
    if not all(stay):
        logger.warning("angles depend on a text's length: they are those of %d", num_positions)
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # the cache is sized by what the device has free


@torch.inference_mode()
def warm_up(
    loaded: LoadedModel, backend: AttentionBackend, block_size: int, cache_dtype: torch.dtype
) -> None:
    """Runs a step of each kind, for which a backend may have to compile kernels.

    Steps differ in whether sequences have one token each, and in whether contexts may be long.
    """
    cache = KVCache(loaded.layers, 1, block_size, cache_dtype, loaded.device)
    for num_tokens in (1, 2):
        for max_context in (1, 4096):
            positions = torch.zeros(num_tokens, dtype=torch.int64, device=loaded.device)
            batch = AttentionInput(
                slot_mapping=positions,
                block_tables=positions.new_zeros(1, -(-max_context // block_size)).int(),
                query_start_loc=torch.tensor([0, num_tokens], device=loaded.device).int(),
                context_lens=torch.tensor([1], device=loaded.device).int(),
            )
            loaded.model(
                input_ids=positions.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                attention_step=AttentionStep(cache.layers, batch, backend),
            )


def _objection(
    loaded: LoadedModel, backend: AttentionBackend, expected: Tensor, trial: _Trial | None = None
) -> str | None:
    """Why a backend cannot be used for a model, if it cannot."""
    try:
        actual = _paged_logits(loaded, backend, trial)
    except torch.AcceleratorError:  # nothing else will run on this device
        raise
    except Exception as error:  # whatever a compiler can miss on a machine, the model is served
        return f"it does not run here: {_first_line(error)}"
    difference = _difference(actual, expected)
    if difference <= _tolerance(loaded.dtype):
        return None
    return f"its logits differ by {difference:.2%}"


def quantize_model(loaded: LoadedModel) -> None:
    """Quantises a model's weights, as its scheme says; nothing without one.

    The checks of `prepare_model` and `backend_agrees` come before this: they compare logits more
    closely than rounded activations allow, which turn small differences into larger ones. What is
    checked here is that the model has not become another one.

    Raises:
        ModelLoadError: the scheme does not run on this device, or spoils the model.
    """
    if loaded.scheme is None:
        return
    name = loaded.scheme.name
    expected = _paged_logits(loaded, ReferenceAttention())
    try:
        quantization.apply(loaded.model, loaded.scheme)
        actual = _paged_logits(loaded, ReferenceAttention())
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"not enough memory for quantize={name}: {error}") from error
    except Exception as error:  # what a device or a version of torch lacks
        raise ModelLoadError(f"quantize={name} does not run here: {_first_line(error)}") from error
    change = float((actual - expected).std() / expected.std())
    if not change <= _MAX_QUANTIZATION_ERROR:  # also when it is not a number
        raise ModelLoadError(
            f"quantize={name} spoils this model: its logits change by {change:.0%}"
        )
    logger.info("logits change by %.1f %% of their spread", 100 * change)
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # the cache is sized by what the device has free


def _difference(actual: Tensor, expected: Tensor) -> float:
    """The worst token's root mean square difference of logits, as a share of all logits' spread.

    Not the largest difference of any: of half a million numbers in bfloat16 that comes to a
    quarter of the spread. A model that computes something else is at 1.4.
    """
    errors = (actual - expected).square().mean(dim=-1).sqrt()
    return float(errors.max()) / (float(expected.std()) or 1.0)


def _tolerance(dtype: torch.dtype) -> float:
    """How far logits may be from those expected."""
    roundings = _SELF_CHECK_ROUNDINGS * torch.finfo(dtype).eps
    return _SELF_CHECK_TOLERANCE.get(dtype, roundings)


def _choose_dtype(name: str | None, device: torch.device, model_config: Any) -> torch.dtype:
    if name is not None:
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32  # half formats are emulated, and slower, on most CPUs
    dtype = getattr(model_config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _self_check_ids(model: PreTrainedModel, num_tokens: int = _SELF_CHECK_TOKENS) -> Tensor:
    """Int64 [1, num_tokens]: ids spread over the vocabulary."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, num_tokens + 1, device=model.device) * 7919 % vocab_size
    return ids.unsqueeze(0)


@dataclass(frozen=True, slots=True)
class _Trial:
    """How many tokens are computed, over which cache."""

    num_tokens: int
    block_size: int
    cache_dtype: torch.dtype


@torch.inference_mode()
def _stock_logits(model: PreTrainedModel) -> Tensor:
    logits = model(input_ids=_self_check_ids(model), use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits[0].float()


@torch.inference_mode()
def _paged_logits(
    loaded: LoadedModel, backend: AttentionBackend, trial: _Trial | None = None
) -> Tensor:
    """The same logits by way of a cache, computed in two chunks and a decode step."""
    trial = trial or _Trial(_SELF_CHECK_TOKENS, 16, loaded.dtype)
    model = loaded.model
    ids = _self_check_ids(model, trial.num_tokens)
    num_blocks = -(-trial.num_tokens // trial.block_size)
    cache = KVCache(loaded.layers, num_blocks, trial.block_size, trial.cache_dtype, model.device)
    chunks = []
    for start, end in itertools.pairwise((0, 11, trial.num_tokens - 1, trial.num_tokens)):
        positions = torch.arange(start, end, device=model.device)
        batch = AttentionInput(
            slot_mapping=positions,
            block_tables=torch.arange(cache.num_blocks, device=model.device).int().unsqueeze(0),
            query_start_loc=torch.tensor([0, end - start], device=model.device).int(),
            context_lens=torch.tensor([end], device=model.device).int(),
        )
        step = AttentionStep(cache.layers, batch, backend)
        output = model(
            input_ids=ids[:, start:end],
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            attention_step=step,
        )
        chunks.append(output.logits[0].float())
    return torch.cat(chunks)


@torch.inference_mode()
def _probe_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """Runs one token to see which layers attend, and with which shapes."""
    layers: dict[int, LayerShape] = {}

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        index = module.layer_idx
        assert isinstance(index, int)
        if index in layers:
            raise ValueError("layers share a cache")
        layers[index] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_PROBE, probe)
    model.set_attn_implementation(_PROBE)
    model(input_ids=_self_check_ids(model)[:, :1], use_cache=False)
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    if len(layers) != num_layers:
        raise ValueError(f"{len(layers)} of its {num_layers} layers use the attention interface")
    return layers
