"""The weights of a directory: which files they are in, and whether these are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .file_state import check_not_pointer, read_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")  # of weights
# Rows of these are token ids, in the architectures that transformers has.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def check_weights(directory: Path) -> list[Path]:
    """Checks the files of weights, by their headers and sizes.

    Returns:
        The files, in the order of their names.

    Raises:
        ValueError: there are none that can be loaded, or one is missing or broken; the text is one
            line with the file's name.
    """
    files = _files(directory)
    for file in files:
        _check_file(file)
    return files


def embedding_rows(files: list[Path]) -> int | None:
    """How many token ids the embedding has; None if it cannot be told from the names of tensors."""
    rows = set()
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                if name.endswith(_EMBEDDINGS):
                    rows.add(tensors.get_slice(name).get_shape()[0])
    return rows.pop() if len(rows) == 1 else None


def _files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if not (directory / _INDEX).is_file():
        raise ValueError(_what_there_is_instead(directory))
    shards = read_object(directory / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{directory / _INDEX} has no weight_map")
    if wrong := [name for name in shards.values() if not _is_shard(name)]:
        text = f"{directory / _INDEX} names {wrong[0]!r}, which is no file of safetensors beside it"
        raise ValueError(text)
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} lacks {_listed(missing)}, of the {len(names)} files of weights that "
            f"{_INDEX} names"
        )
    return [directory / name for name in names]


def _is_shard(name: Any) -> bool:
    """Whether this can be the name of a file of weights in the same directory."""
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name


def _what_there_is_instead(directory: Path) -> str:
    """Why there are no weights, for one who has others or has forgotten them."""
    names = sorted(file.name for file in directory.iterdir())
    if (directory / "adapter_config.json").is_file():
        return f"{directory} is an adapter and no model; give it to --lora-adapters"
    if other := [name for name in names if name.endswith(_OTHER_SUFFIXES)]:
        return (
            f"the weights in {directory} are not in safetensors, the only format that is loaded: "
            f'{_listed(other)}. To convert them: python -c "from transformers import '
            "AutoModelForCausalLM as M; M.from_pretrained('.').save_pretrained('.')\" there"
        )
    if other := [name for name in names if name.endswith(".safetensors")]:
        return f"{directory} has {_listed(other)}, and neither {_SINGLE} nor {_INDEX}"
    return f"there are no weights in {directory}: neither {_SINGLE} nor {_INDEX}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_file(path: Path) -> None:
    check_not_pointer(path)
    try:
        with safe_open(path, framework="numpy"):  # compares the header with the file's size
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is truncated or damaged, or no safetensors: {error}") from error
