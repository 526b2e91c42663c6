"""Memory of large requests stays for the next ones, up to a bound."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from service.workers import heap

KEPT = heap._KEPT_BYTES


@pytest.mark.parametrize(
    ("resident", "num_trims"),
    [
        ([50 * KEPT, 10 * KEPT], 1),  # the first time
        ([50 * KEPT, 10 * KEPT, 11 * KEPT, 9 * KEPT, 11 * KEPT], 1),
        ([50 * KEPT, 10 * KEPT, 11 * KEPT + 1, 10 * KEPT], 2),
    ],
)
def test_memory_is_given_back_once_the_process_has_grown(
    resident: list[int], num_trims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trims: list[int] = []
    sizes = iter(resident)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(sizes)))
    monkeypatch.setattr("service.workers.heap.psutil.Process", lambda: process)
    monkeypatch.setattr("service.workers.heap.trim", lambda: trims.append(1))
    monkeypatch.setattr(heap._Process, "trimmed_bytes", 0)
    for _ in range(len(resident) - num_trims):
        heap.trim_if_grown()
    assert len(trims) == num_trims
    assert not list(sizes)
