"""The tokenizer as grammars need it: the model's tokens only, special ones under other names."""

from __future__ import annotations

import json
from typing import Any

from ..protocol.token_names import rename_tokens

UNSPEAKABLE = "\ufdd0"  # begins the names of special tokens: Unicode says that no text has it


def fitted(tokenizer: str, vocab_size: int) -> str:
    """A tokenizer.json without tokens that the model lacks, and with other names for special ones.

    A grammar's library tokenizes a forced text with the tokenizer, which would turn the text
    "<|end|>" into the token that ends a sequence: the new names are ones that no text contains.

    Args:
        tokenizer: the tokenizer.json.
        vocab_size: width of the model's logits. A tokenizer may have more, for instance for images.
    """
    spec = json.loads(tokenizer)
    added = [token for token in spec.get("added_tokens") or () if token["id"] < vocab_size]
    names = {token["content"]: f"{UNSPEAKABLE}{token['id']}" for token in added if token["special"]}
    spec["added_tokens"] = added
    _cut(spec.get("model") or {}, vocab_size)
    rename_tokens(spec, names)
    spec["post_processor"] = None  # it adds special tokens, by name
    return json.dumps(spec)


def _cut(model: dict[str, Any], vocab_size: int) -> None:
    """Removes pieces whose ids are too large, and all that refers to them."""
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: ids are positions
        del vocab[vocab_size:]
    if not isinstance(vocab, dict) or max(vocab.values(), default=0) < vocab_size:
        return
    kept = {piece: token_id for piece, token_id in vocab.items() if token_id < vocab_size}
    model["vocab"] = kept
    if model.get("unk_token") not in kept:
        model["unk_token"] = None
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _is_possible(merge, kept)]


def _is_possible(merge: str | list[str], vocab: dict[str, int]) -> bool:
    """Whether a pair of pieces and what they become are there; older files have it as one text."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in vocab and right in vocab and left + right in vocab
