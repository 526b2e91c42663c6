"""What a model's class and configuration say about its layers, before anything is computed."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedConfig, PreTrainedModel

from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError

_DEFAULT_MAX_TOTAL_TOKENS = 4096  # TGI's default takes no more of the model's own positions

_CHUNKED = "chunked_attention"
_ATTENTION = frozenset({"full_attention", "sliding_attention", _CHUNKED})
_WITH_STATE = frozenset({"conv", "linear_attention", "recurrent", "hybrid", "hybrid_sliding"})
_SPARSE = frozenset(
    {
        "indexed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "minimax_m3_sparse",
    }
)

_REASONS = {
    "paligemma": "all tokens of a prompt, its image's and its text's, see each other, so that no "
    "part of it could be computed, or kept, without the rest",
}

# Fields of MPT's attention of which transformers takes no notice.
_UNHEEDED = ("alibi", "alibi_bias_max", "attn_type", "prefix_lm", "qk_ln")


def refusal(model: PreTrainedModel, stateful: Collection[int]) -> str | None:
    """Why a model cannot run on the paged attention; None if nothing is known against it.

    `stateful` are the indexes of layers with a state that the engine can keep.
    """
    if (reason := refusal_of_configuration(model.config)) is not None:
        return reason
    kinds = layer_types(model.config)
    others = {kind for index, kind in enumerate(kinds) if index not in stateful}
    states = sorted(_WITH_STATE & others)
    is_known = stateful or (kinds and _ATTENTION.issuperset(kinds))
    if states or (getattr(model, "_is_stateful", False) and not is_known):
        layers = f"layers of the type {', '.join(states)}" if states else "it"
        return f"{layers} keep{'' if states else 's'} a state that the engine cannot keep"
    if not stateful and not model._can_set_attn_implementation():
        return (
            "its layers compute attention themselves (older code), and not through the attention "
            "interface of transformers"
        )
    return None


def refusal_of_configuration(config: PreTrainedConfig) -> str | None:
    """The part of `refusal` that a configuration alone decides."""
    if (reason := _REASONS.get(str(config.model_type))) is not None:
        return reason
    if unheeded := _unheeded(config):
        return f"transformers takes no notice of {', '.join(unheeded)} in its configuration"
    if getattr(config.get_text_config(), "index_topk", None):
        return "an indexer chooses what its attention sees"
    if sparse := sorted(_SPARSE & set(layer_types(config))):
        return (
            f"layers of the type {', '.join(sparse)} choose the tokens that they attend to, with a "
            "cache of their own"
        )
    return None


def _unheeded(config: PreTrainedConfig) -> list[str]:
    """Fields of a configuration that ask for what transformers does not compute."""
    asked = getattr(config, "attn_config", None)
    if config.model_type != "mpt" or not isinstance(asked, PreTrainedConfig):
        return []
    usual = type(asked)()
    return [
        f"attn_config.{name} ({getattr(asked, name)})"
        for name in _UNHEEDED
        if getattr(asked, name) != getattr(usual, name)
    ]


def max_total_tokens(config: EngineConfig, model_config: PreTrainedConfig) -> int:
    """The most tokens that a text may have, as the engine's configuration wants it.

    Raises:
        ModelLoadError: the model has fewer positions, or none to continue a text.
    """
    trained = num_positions(model_config, _DEFAULT_MAX_TOTAL_TOKENS)
    if trained < 2:  # a token, and one that continues it
        raise ModelLoadError(f"{config.model_id} has {trained} positions (max_position_embeddings)")
    wanted = config.max_total_tokens or min(trained, _DEFAULT_MAX_TOTAL_TOKENS)
    if wanted > trained:
        raise ModelLoadError(
            f"max_total_tokens must be <= {trained}, the positions that {config.model_id} has. "
            f"Given: {wanted}"
        )
    return wanted


def num_positions(model_config: PreTrainedConfig, default: int) -> int:
    """The most tokens that a text may have, by a model's configuration."""
    config = model_config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    return int(next((getattr(config, name) for name in names if hasattr(config, name)), default))


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The type of each layer, by the names of transformers; none if all are of one type."""
    return list(getattr(config.get_text_config(), "layer_types", None) or ())


def chunk_sizes(model: PreTrainedModel) -> dict[int, int]:
    """Positions of a chunk, by the index of the layers with chunked attention.

    Transformers tells such layers only by their mask, which attention functions of others do not
    get.
    """
    size = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    kinds = enumerate(layer_types(model.config))
    return {index: int(size) for index, kind in kinds if kind == _CHUNKED and size}
