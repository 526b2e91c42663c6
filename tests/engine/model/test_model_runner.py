"""A step for which memory is short."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.model.model_runner import ModelRunner

LOGITS = torch.ones(1, 4)


class Short:
    """A model that runs out of memory in its first passes."""

    device = torch.device("cpu")

    def __init__(self, num_failures: int) -> None:
        self.num_passes = 0
        self._num_failures = num_failures

    def logits(self, *_: object) -> torch.Tensor:
        self.num_passes += 1
        if self.num_passes <= self._num_failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return LOGITS


def runner(model: Short, pool: Any = None) -> ModelRunner:
    cache: Any = SimpleNamespace(layers={})
    backend: Any = None
    loaded: Any = model
    return ModelRunner(loaded, cache, backend, pool)


@pytest.fixture
def batch() -> Any:
    names = ("input_ids", "positions", "attention", "logits_rows", "states", "images")
    return SimpleNamespace(**dict.fromkeys(names))


def test_a_step_is_computed_again_once_what_torch_keeps_is_free(
    batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []
    model = Short(1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(model.num_passes))
    assert runner(model).forward(batch) is LOGITS
    assert freed == [1]
    assert model.num_passes == 2


def test_a_step_that_does_not_fit_fails(batch: Any) -> None:
    model = Short(2)
    with pytest.raises(torch.OutOfMemoryError):
        runner(model).forward(batch)
    assert model.num_passes == 2


def test_states_are_not_computed_twice(batch: Any) -> None:
    model = Short(1)
    pool: Any = SimpleNamespace()
    with pytest.raises(torch.OutOfMemoryError):
        runner(model, pool).forward(batch)
    assert model.num_passes == 1


def test_nothing_is_computed_twice_while_it_is_recorded(
    batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = Short(1)
    with pytest.raises(torch.OutOfMemoryError):
        runner(model).forward(batch)
    assert model.num_passes == 1
