"""CTranslate2 as a peer: batches that start together, on what it converts of transformers."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import transformers

from benchmarks.peer_process import Package, PeerProcess, peer_process

PACKAGE = Package(  # its converter reads checkpoints with transformers
    "ctranslate2",
    "4.8.5",
    (f"torch=={torch.__version__}", f"transformers=={transformers.__version__}"),
)
_WORKER = Path(__file__).with_name("ctranslate2_worker.py")


def convert(model: Path) -> Path:
    """Returns what the package's converter makes of a directory of transformers, in float32.

    Raises:
        PeerAbsentError: it cannot be installed, or cannot convert it.
    """
    converted = model / "ctranslate2"
    if not converted.exists():
        converter = str(PACKAGE.home() / "bin" / "ct2-transformers-converter")
        PACKAGE.run(converter, "--model", str(model), "--output_dir", str(converted))
        _name_special_tokens(converted / "config.json")
    return converted


def _name_special_tokens(path: Path) -> None:
    """Gives a model whose texts have no end the names that a generator wants to read."""
    config = json.loads(path.read_text())
    names = {name: config["unk_token"] for name, value in config.items() if value is None}
    path.write_text(json.dumps(config | names))


def ctranslate2(
    converted: Path, precision: str, threads: int
) -> AbstractContextManager[PeerProcess]:
    """Loads a converted model; it keeps weights and computes in float32 or int8.

    Raises:
        PeerAbsentError: it cannot be installed.
    """
    python = str(PACKAGE.home() / "bin" / "python")
    command = [python, str(_WORKER), str(converted), precision, str(threads)]
    return peer_process("CTranslate2", command, {**os.environ, "OMP_NUM_THREADS": str(threads)})
