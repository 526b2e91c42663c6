"""Loads a checkpoint in a process of its own: `python -m tests.e2e.remote_code PART MODEL TRUST`.

Prints what it came to, and behind it what it left of its standard input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from engine.build import build_engine
from engine.protocol.config import EngineConfig
from service.codec.text_worker import start


def _tokenizer(model: str, *, trust: bool) -> None:
    start([model, None, None, trust])


def _engine(model: str, *, trust: bool) -> None:
    build_engine(
        EngineConfig(
            socket_path="unused",
            model_id=model,
            trust_remote_code=trust,
            device="cpu",
            max_total_tokens=64,
            max_batch_total_tokens=128,
        )
    )


_PARTS: dict[str, Callable[..., None]] = {
    "tokenizer": _tokenizer,
    "engine": _engine,
}


def main() -> None:
    part, model, trust = sys.argv[1:]
    try:
        _PARTS[part](model, trust=trust == "yes")
        outcome = "loaded"
    except Exception as error:  # the test reads it
        outcome = str(error)
    sys.stdout.write(f"{outcome}\nleft: {sys.stdin.read()}\n")


if __name__ == "__main__":
    main()
