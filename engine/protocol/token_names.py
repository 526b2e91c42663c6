"""Other names for the tokens of a tokenizer.json.

A tokenizer takes every spelling of a special token for the token. Where a text must not be able to
name it, a copy of the tokenizer knows it by a name that no text contains.
"""

from __future__ import annotations

from typing import Any


def rename_tokens(spec: dict[str, Any], names: dict[str, str]) -> None:
    """Renames tokens in a parsed tokenizer.json, in place; ids stay as they are.

    Args:
        spec: the tokenizer.json.
        names: new names by old ones. Tokens without one keep theirs.
    """
    for token in spec.get("added_tokens") or ():
        token["content"] = names.get(token["content"], token["content"])
    model = spec.get("model") or {}
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    elif isinstance(vocab, list):  # Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
