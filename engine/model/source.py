"""Where transformers finds a checkpoint: a directory, a model on the hub, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..protocol.config import EngineConfig


def is_gguf(config: EngineConfig) -> bool:
    """Whether the checkpoint is a GGUF file."""
    return config.model_id.endswith(".gguf")


def source(config: EngineConfig) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` that say where the checkpoint is."""
    trust = {"trust_remote_code": config.trust_remote_code}
    if is_gguf(config):
        path = Path(config.model_id)
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, **trust}
    return {
        "pretrained_model_name_or_path": config.model_id,
        "revision": config.revision,
        **trust,
    }


def load_tokenizer(config: EngineConfig) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        OSError: there is none.
        ValueError: it cannot be loaded.
    """
    if not is_gguf(config):
        return AutoTokenizer.from_pretrained(**source(config))
    # What this does as well, after it has read the configuration, which takes seconds.
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    architecture, described, arguments = get_gguf_tokenizer(config.model_id)
    backend, _ = convert_gguf_tokenizer(architecture, described)
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=backend, **arguments)
