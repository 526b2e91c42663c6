"""Why a checkpoint cannot be loaded, in one line that names what is wrong in it.

Errors of transformers often have a value of config.json and not the field that it is in, or refer
to a report in the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from traceback import walk_tb
from typing import Any

from transformers import PreTrainedConfig

from ..protocol.config import EngineConfig
from ..protocol.errors import first_line
from .source import is_gguf, source

# Fields that no model has as less than 1, where they are integers.
_SIZES = frozenset(
    {
        "head_dim", "hidden_size", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "sliding_window", "vocab_size",
    }
)  # fmt: skip
_ROPE = ("rope_parameters.", "rope_scaling.")
_ROPE_NAMES = frozenset({"rope_type", "type"})  # everything else there are numbers, or lists


def load_failure(error: Exception, config: EngineConfig) -> str:
    """Says why a checkpoint cannot be loaded."""
    if is_gguf(config) and "is not supported" in str(error):
        return f"{first_line(error)} Load the checkpoint that the file was made of, in safetensors"
    if not config.trust_remote_code and "trust_remote_code" in str(error):
        return "it needs code that comes with it, which runs only with --trust-remote-code"
    if tensor := _unconverted(error):
        return f"{tensor} cannot be made of the checkpoint's tensors, or of their shapes"
    return with_fields(error, _described(config))


def with_fields(error: BaseException, described: Mapping[str, Any]) -> str:
    """An error's first line, or what is wrong in a configuration if that shows.

    Args:
        error: raised by a model's code, or while its configuration was read.
        described: the configuration, as in config.json.
    """
    unknown = _unknown_name(error)
    if unknown is not None and (fields := _fields_of(unknown, described)):
        return f"its configuration has {unknown!r} in {' and '.join(fields)}, which is not known"
    if wrong := _implausible(described):
        return f"{first_line(error)} (its configuration: {', '.join(wrong)})"
    return first_line(error)


def _described(config: EngineConfig) -> dict[str, Any]:
    """What config.json has, or a GGUF file in its place; empty if that cannot be read."""
    try:
        described = PreTrainedConfig.get_config_dict(**source(config))[0]
    except Exception:  # the same fault, maybe
        return {}
    return described if isinstance(described, dict) else {}


def _unknown_name(error: BaseException) -> str | None:
    """The name that was looked up in a table, or in torch, and is not there."""
    if isinstance(error, KeyError) and error.args:
        return error.args[0] if isinstance(error.args[0], str) else None
    return error.name if isinstance(error, AttributeError) else None


def _fields_of(value: str, described: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, found in _leaves(described)
        if found == value or (isinstance(found, list) and value in found)
    ]


def _implausible(described: Mapping[str, Any]) -> list[str]:
    """Fields that may be the reason of an error: sizes below 1, values of wrong types."""
    return [f"{name} is {value!r}" for name, value in _leaves(described) if _is_odd(name, value)]


def _is_odd(name: str, value: Any) -> bool:
    last = name.rpartition(".")[2]
    if any(part in name for part in _ROPE) and value is not None:
        return isinstance(value, str) != (last in _ROPE_NAMES)
    if name == "quantization_config":  # no object
        return value is not None
    return last in _SIZES and isinstance(value, int) and value < 1


def _leaves(described: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields and their values; those of objects have the names of these before them."""
    for name, value in described.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unconverted(error: BaseException) -> str | None:
    """A tensor that transformers could not make of a checkpoint's; its message refers to a log."""
    for frame, _ in walk_tb(error.__traceback__):
        report = frame.f_locals.get("loading_info")
        if failed := getattr(report, "conversion_errors", None):
            return str(min(failed))
    return None
