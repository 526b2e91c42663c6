"""What things take, as measured on a machine that has a name; see `calibrate.py`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

MEASURED = Path(__file__).with_name("costs.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a step of the engine: base + per_row · rows + per_prompt_token · … + ….

    Attributes:
        base_s: of every step, mostly reading the weights.
        per_row_s: for each sequence that gets a token.
        per_prompt_token_s: for each token of a prompt that is computed.
        per_context_token_s: for each token in the cache that a decoding row attends to.
    """

    base_s: float
    per_row_s: float
    per_prompt_token_s: float
    per_context_token_s: float

    def seconds(self, rows: int, prompt_tokens: int, context_tokens: float) -> float:
        """Of a step."""
        return (
            self.base_s
            + self.per_row_s * rows
            + self.per_prompt_token_s * prompt_tokens
            + self.per_context_token_s * context_tokens
        )

    def calls_per_s(self, rows: int, prompt_tokens: float, new_tokens: float) -> float:
        """What a replica carries whose `rows` rows are never empty, without a prefix cache.

        A call stays for `new_tokens` steps, so each step has `rows / new_tokens` new prompts.
        """
        ending = rows / new_tokens
        context = rows * (prompt_tokens + new_tokens / 2)
        step_s = (
            self.base_s
            + self.per_row_s * rows
            + self.per_prompt_token_s * ending * prompt_tokens
            + self.per_context_token_s * context
        )
        return ending / step_s

    def faster(self, times: float) -> Self:
        """The same on a device that is so many times as fast."""
        return type(self)(**{name: value / times for name, value in asdict(self).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """Processor seconds of a process that passes calls and their tokens on.

    Attributes:
        idle_share: the part of a processor that it takes without any call.
        per_call_s: for each call.
        per_token_s: for each token of an answer.
    """

    idle_share: float
    per_call_s: float
    per_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """All that the simulation knows of a machine.

    Attributes:
        step: of an engine.
        service: of a service process.
        envoy: of Envoy.
    """

    step: StepCost
    service: Handling
    envoy: Handling


def measured(path: Path = MEASURED) -> Costs:
    """What was measured; the file has the machine and the errors of the fit beside it."""
    found: dict[str, Any] = json.loads(path.read_text())
    return Costs(
        step=StepCost(**found["step"]["seconds"]),
        service=Handling(**found["service"]["seconds"]),
        envoy=Handling(**found["envoy"]["seconds"]),
    )
