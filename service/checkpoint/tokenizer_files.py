"""The tokenizer of a directory: whether there is one, and whether the model knows its tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .file_state import check_not_pointer, read_object

_FAST = "tokenizer.json"
_MERGES = "merges.txt"  # beside a vocab.json
# What transformers makes a fast tokenizer of, and the package that it needs for that.
_CONVERTED = {
    "tokenizer.model": "sentencepiece",
    "spiece.model": "sentencepiece",
    "tekken.json": None,
    "vocab.json": None,
    "vocab.txt": None,
}


def last_ordinary_id(directory: Path) -> int | None:
    """Looks for a tokenizer; returns the largest id of its vocabulary without added tokens.

    Added tokens are left out because there are models that lack one on purpose, that of images for
    example. None where the vocabulary is in no tokenizer.json.

    Raises:
        ValueError: there is none that can be loaded; the text is one line.
    """
    if not (directory / _FAST).is_file():
        _check_others(directory)
        return None
    content = read_object(directory / _FAST)
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict):
        raise ValueError(f"{directory / _FAST} is no tokenizer: it has no model")
    vocabulary: Any = model.get("vocab")
    if isinstance(vocabulary, list):  # of a unigram model: words and scores
        vocabulary = {index: index for index in range(len(vocabulary))}
    if not isinstance(vocabulary, dict):
        return None
    items = added if isinstance(added, list) else ()
    ids = [*vocabulary.values()]
    added_ids = [item.get("id") for item in items if isinstance(item, dict)]
    if not all(type(index) is int for index in ids + added_ids):
        raise ValueError(f"{directory / _FAST}: an id of its vocabulary is not an integer")
    return max(set(ids) - set(added_ids), default=None)


def converted_files(directory: Path) -> list[str]:
    """What a fast tokenizer has to be made of; nothing where there is one, or no such directory."""
    if (directory / _FAST).is_file():
        return []
    return [name for name in _CONVERTED if (directory / name).is_file()]


def _check_others(directory: Path) -> None:
    present = converted_files(directory)
    if not present:
        raise ValueError(f"there is no tokenizer in {directory}: {_FAST} is missing")
    for name in (*present, _MERGES):
        if (directory / name).is_file():
            check_not_pointer(directory / name)
    missing = [package for name in present if (package := _CONVERTED[name]) is not None]
    if len(missing) == len(present) and all(find_spec(package) is None for package in missing):
        raise ValueError(
            f"{directory} has {present[0]} and no {_FAST}; the package {missing[0]}, which is not "
            f"installed, makes one of the other, or get {_FAST} from where the model comes from"
        )
