"""Whether a directory or a file is a model that can be loaded."""

from __future__ import annotations

from pathlib import Path

from .file_state import read_object
from .path import GGUF, gguf_file, is_path
from .tokenizer_files import last_ordinary_id
from .weights import check_weights, embedding_rows


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
    else:
        raise NotADirectoryError(f"{path} is neither a model's directory nor a GGUF file")


def _check_directory(path: Path) -> None:
    if not any(path.iterdir()):
        raise FileNotFoundError(f"there is nothing in {path}")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {path}")
    config = read_object(path / "config.json")
    files = check_weights(path)
    if "auto_map" in config:  # its code may load any tokenizer
        return
    last, rows = last_ordinary_id(path), embedding_rows(files)
    if rows is not None and last is not None and last >= rows:
        raise ValueError(
            f"the tokenizer in {path} does not belong to this model: it has ids up to {last}, and "
            f"the embedding has {rows} rows"
        )
