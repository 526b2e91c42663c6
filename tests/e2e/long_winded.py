"""The bundled model with room for texts that are still running whenever a test looks at them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.e2e.stack import ENDLESS
from tests.paths import DEMO_MODEL

_MAX_TOTAL_TOKENS = 20_000  # of which an engine computes some 1000 a second
LONG: dict[str, Any] = ENDLESS | {"max_new_tokens": _MAX_TOTAL_TOKENS - 100, "ignore_eos": True}


def long_winded(directory: Path) -> tuple[str, ...]:
    """Flags for a server of a copy of the model, which it makes in a new directory."""
    shutil.copytree(DEMO_MODEL, directory)
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"max_position_embeddings": _MAX_TOTAL_TOKENS}
    file.write_text(json.dumps(config))
    return (
        f"--model-id={directory}",
        f"--max-total-tokens={_MAX_TOTAL_TOKENS}",
        f"--max-batch-total-tokens={2 * _MAX_TOTAL_TOKENS}",
    )
