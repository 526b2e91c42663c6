"""What a name of a model stands for: a directory, a GGUF file, or a model on the hub."""

from __future__ import annotations

from pathlib import Path

GGUF = ".gguf"
MAGIC = b"GGUF"


def is_path(model_id: str) -> bool:
    """Whether this cannot be the name of a model on the hub: these have one slash at most."""
    return (
        model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1 or model_id.endswith(GGUF)
    )


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that this is, or that this directory has in place of other weights.

    Raises:
        ValueError: there are several to choose from.
    """
    if path.is_file():
        return path if path.suffix == GGUF else None
    files = sorted(path.glob(f"*{GGUF}")) if path.is_dir() else []
    if not files or any(path.glob("*.safetensors*")):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"there are several GGUF files in {path}; give the path of one: {names}")
    return files[0]


def has_magic(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def resolve(model_id: str) -> str:
    """What to load: the GGUF file of a directory that has one, otherwise what was asked for."""
    path = Path(model_id).expanduser()
    try:
        file = gguf_file(path)
    except (OSError, ValueError):  # which the check of files reports
        file = None
    if file is not None:
        return str(file)
    return str(path) if path.exists() else model_id
