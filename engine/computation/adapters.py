"""The adapters of the start, and places for more, beside a model's layers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..adapters.adapted_forward import AdaptedForward, SlottedForward
from ..adapters.adapted_layers import AdaptedLayers, check_updates
from ..adapters.bank import AdapterBank
from ..adapters.loader import AdapterLoader
from ..adapters.peft_directory import describe_adapter, read_adapter
from ..adapters.segmented_updates import segmented_agrees
from ..executor import Forward
from ..model.loaded import LoadedModel
from ..model.prepare import native_kernels
from ..protocol.config import EngineConfig
from ..protocol.errors import AdapterError, ModelLoadError
from ..shards.group import Group

_NUM_SLOTS = 8  # adapters on the device, and those that can be loaded, unless settings say more
_NUM_LOADED = 32


def adapter_bank(
    config: EngineConfig, loaded: LoadedModel, group: Group | None
) -> AdapterBank | None:
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


def check_adapters(config: EngineConfig, model: PreTrainedModel) -> None:
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


def adapted(forward: Forward, adapters: AdapterBank | None) -> Forward:
    """A forward whose steps may have rows with slots of adapters."""
    return forward if adapters is None else AdaptedForward(forward, adapters.layers.step)


def slotted(forward: Forward, adapters: AdapterBank | None) -> Forward:
    """A forward whose steps may have rows with adapters."""
    if adapters is None:
        return forward
    return SlottedForward(forward, adapters, needs_all_rows=adapters.layers.needs_all_rows)
