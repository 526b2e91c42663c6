"""Loads a transformers model and proves, before it serves, that our attention gives its logits."""

from __future__ import annotations

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
# Of the logits' spread. int4 comes to 0.15 in the bundled model, to 0.4 in one of random weights.
_MAX_QUANTIZATION_ERROR = 0.9
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3}  # of logits; half formats: 5e-2 of their spread


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
        layers = _probe_layers(model)
        model.set_attn_implementation(IMPLEMENTATION)
        actual = _paged_logits(model, layers, dtype, ReferenceAttention())
    except Exception as error:
        raise ModelLoadError(
            f"{name} does not run on paged attention: {_first_line(error)}"
        ) from error
    difference = float((expected - actual).abs().max())
    if not difference <= _tolerance(expected, dtype):  # also when it is not a number
        raise ModelLoadError(
            f"{name} is not supported: its logits on paged attention differ by {difference:.3g}"
        )
    return LoadedModel(model, layers, device, dtype)


def backend_agrees(loaded: LoadedModel, backend: AttentionBackend) -> bool:
    """Whether the model has the logits of the reference with this backend. Logs why not."""
    expected = _paged_logits(loaded.model, loaded.layers, loaded.dtype, ReferenceAttention())
    objection = _objection(loaded, backend, expected)
    if objection is not None:
        logger.warning("%s is not used: %s", type(backend).__name__, objection)
    return objection is None


def fuse_rotation(loaded: LoadedModel, backend: AttentionBackend) -> bool:
    """Lets a backend rotate query and key, if it can and the model's logits stay what they are."""
    if not isinstance(backend, RotaryBackend):
        return False
    expected = _paged_logits(loaded.model, loaded.layers, loaded.dtype, ReferenceAttention())
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
    expected = _paged_logits(loaded.model, loaded.layers, loaded.dtype, ReferenceAttention())
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
    expected = _paged_logits(model, loaded.layers, loaded.dtype, ReferenceAttention())
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


def _objection(loaded: LoadedModel, backend: AttentionBackend, expected: Tensor) -> str | None:
    """Why a backend cannot be used for a model, if it cannot."""
    try:
        actual = _paged_logits(loaded.model, loaded.layers, loaded.dtype, backend)
    except Exception as error:  # whatever a compiler can miss on a machine, the model is served
        return f"it does not run here: {_first_line(error)}"
    difference = float((expected - actual).abs().max())
    if difference <= _tolerance(expected, loaded.dtype):
        return None
    return f"its logits differ by {difference:.3g}"


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
    model, layers, dtype = loaded.model, loaded.layers, loaded.dtype
    expected = _paged_logits(model, layers, dtype, ReferenceAttention())
    try:
        quantization.apply(model, loaded.scheme)
        actual = _paged_logits(model, layers, dtype, ReferenceAttention())
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


def _tolerance(expected: Tensor, dtype: torch.dtype) -> float:
    """How far logits may be from those expected."""
    spread = float(expected.std()) or 1.0
    return _SELF_CHECK_TOLERANCE.get(dtype, 5e-2) * max(1.0, spread)


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


def _self_check_ids(model: PreTrainedModel) -> Tensor:
    """Int64 [1, tokens]: ids spread over the vocabulary."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, _SELF_CHECK_TOKENS + 1, device=model.device) * 7919 % vocab_size
    return ids.unsqueeze(0)


@torch.inference_mode()
def _stock_logits(model: PreTrainedModel) -> Tensor:
    logits = model(input_ids=_self_check_ids(model), use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits[0].float()


@torch.inference_mode()
def _paged_logits(
    model: PreTrainedModel,
    layers: dict[int, LayerShape],
    dtype: torch.dtype,
    backend: AttentionBackend,
) -> Tensor:
    """The same logits by way of a cache, computed in two chunks."""
    ids = _self_check_ids(model)
    num_tokens = ids.shape[1]
    block_size = 16
    cache = KVCache(layers, -(-num_tokens // block_size), block_size, dtype, model.device)
    chunks = []
    for start, end in ((0, 11), (11, num_tokens)):
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
