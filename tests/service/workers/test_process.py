"""A process for work that may take too long, where the machine has no time for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.protocol.wire import framed
from service.workers import process, template
from service.workers.process import LateError, WorkerProcess
from service.workers.template import Template

_MODULE = "tests.service.workers.silent_worker"


def _of_module() -> WorkerProcess:
    return WorkerProcess.of_module(_MODULE, 1 << 40, framed([]))


def _of_template() -> WorkerProcess:
    return WorkerProcess.of_template(Template(_MODULE, 1 << 40, framed([])))


@pytest.mark.parametrize("make", [_of_module, _of_template])
async def test_a_request_is_not_at_fault_when_its_process_does_not_come_up(
    make: Callable[[], WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (process, template):
        monkeypatch.setattr(module, "START_S", 0.01)
    worker = make()
    with pytest.raises(LateError) as late:
        await worker.ask("a request", 100)
    assert late.value.is_starved
    await worker.stop()
