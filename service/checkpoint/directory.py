"""Whether a directory or a file is a model that can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .file_state import check_text, read_object
from .path import GGUF, gguf_file, has_magic, is_path
from .tokenizer_files import last_ordinary_id
from .weights import check_weights, embedding_rows

# What transformers reads as well where it is there. Some it leaves out without a word if they are
# broken, and the model ends its texts elsewhere, or in every chat reads something else.
_GENERATION = "generation_config.json"
_OBJECTS = (
    _GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.json",
)  # fmt: skip
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")


def check_checkpoint(model_id: str) -> None:
    """Checks a model that is on this machine, as far as it shows without loading it.

    The first thing that is wrong is reported. Names of the hub pass.

    Raises:
        ValueError: it cannot be loaded; the text is one line with the path of what is wrong.
        OSError: a file cannot be read.
    """
    path = Path(model_id).expanduser()
    if not path.exists():
        if is_path(model_id):
            kind = "file" if path.suffix == GGUF else "directory"
            raise FileNotFoundError(f"there is no such {kind}: {path}")
        return
    file = gguf_file(path)
    if file is not None:
        from .gguf import read_gguf  # with numpy, which other starts do without

        read_gguf(file).check()
    elif path.is_dir():
        _check_directory(path)
    elif has_magic(path):
        raise ValueError(
            f"{path} is a GGUF file; its name, or that of a link, has to end in {GGUF}"
        )
    else:
        raise NotADirectoryError(f"{path} is neither a model's directory nor a GGUF file")


def _check_directory(path: Path) -> None:
    if not any(path.iterdir()):
        raise FileNotFoundError(f"there is nothing in {path}")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {path}")
    config = read_object(path / "config.json")
    _check_ends(path / "config.json", config)
    _check_others(path)
    files = check_weights(path)
    if "auto_map" in config:  # its code may load any tokenizer
        return
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path / 'config.json'} has no model_type, the name of an architecture")
    last, rows = last_ordinary_id(path), embedding_rows(files)
    if rows is not None and last is not None and last >= rows:
        raise ValueError(
            f"the tokenizer in {path} does not belong to this model: it has ids up to {last}, and "
            f"the embedding has {rows} rows"
        )


def _check_others(path: Path) -> None:
    for name in _OBJECTS:
        file = path / name
        if file.is_file():
            content = read_object(file)
            if name == _GENERATION:
                _check_ends(file, content)
    for pattern in _TEMPLATES:
        for file in sorted(path.glob(pattern)):
            check_text(file)


def _check_ends(file: Path, content: dict[str, Any]) -> None:
    """Checks the tokens that end a text."""
    ends = content.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(index) is int for index in listed):
        raise ValueError(f"{file}: eos_token_id is {ends!r}, which is no id of a token, nor a list")
