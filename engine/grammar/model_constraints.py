"""The constraints of an engine's model, made of its tokenizer."""

from __future__ import annotations

import logging

from ..model.loaded import LoadedModel
from ..model.source import load_tokenizer
from ..protocol.config import EngineConfig
from ..protocol.errors import GrammarError
from .compiler import GrammarCompiler
from .constraints import Constraints
from .masks import TokenMasks

logger = logging.getLogger(__name__)


def constraints_of(
    config: EngineConfig, loaded: LoadedModel, vocab_size: int
) -> Constraints | None:
    """Grammars, which need a fast tokenizer to know how tokens are spelt; None without one.

    What every grammar needs is built now, for the tokens that usually end a text.
    """
    try:
        tokenizer = load_tokenizer(config)
    except Exception:  # a broken one can fail in any way; the service, which needs it, says why
        tokenizer = None
    if tokenizer is None or not tokenizer.is_fast:
        logger.warning("%s has no fast tokenizer: no grammars", config.model_id)
        return None
    compiler = GrammarCompiler(tokenizer.backend_tokenizer.to_str(), vocab_size)
    try:
        compiler.warm(_eos_token_ids(loaded, tokenizer.eos_token_id, vocab_size))
    except GrammarError as error:
        logger.warning("%s", error)
    return Constraints(compiler, TokenMasks(vocab_size))


def _eos_token_ids(loaded: LoadedModel, own: int | None, vocab_size: int) -> frozenset[int]:
    """The tokens that end a text, as the service finds them: a list of the model's, or both."""
    listed = getattr(loaded.model.generation_config, "eos_token_id", None)
    known = listed if isinstance(listed, list) else [listed, own]
    return frozenset(index for index in known if isinstance(index, int) and index < vocab_size)
