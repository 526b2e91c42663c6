"""Parts of the benchmark of replicas: who takes which turn, and which process is which."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator

import pytest

from benchmarks import processes
from benchmarks.scale import HEADER, Connections, Point, Sizes, cells, main
from service.bench.sample import Sample
from service.bench.summary import summarise
from service.bench.transport import Task
from service.client.target import parse_target


class Fake:
    """A transport that counts its streams."""

    def __init__(self) -> None:
        self.num_streams = 0
        self.is_closed = False

    async def token_stops(self, text: str) -> list[int]:
        return [len(text)]

    async def metrics(self) -> str:
        return ""

    async def stream(self, task: Task) -> AsyncGenerator[None]:
        self.num_streams += 1
        for _ in range(task.max_new_tokens):
            yield

    async def close(self) -> None:
        self.is_closed = True


async def test_connections_take_turns() -> None:
    fakes = [Fake(), Fake(), Fake()]
    together = Connections([*fakes])
    for _ in range(6):
        assert len([None async for _ in together.stream(Task("a", 3, 0))]) == 3
    await together.close()
    assert [fake.num_streams for fake in fakes] == [2, 2, 2]
    assert all(fake.is_closed for fake in fakes)


@pytest.mark.parametrize(
    ("words", "role"),
    [
        (["-m", "service.cli", "engine", "--port=1"], "engine"),
        (["-m", "service.cli", "service"], "service"),
        (["-m", "benchmarks.echo_engine", "a"], "engine"),
        (["-m", "service.cli", "serve"], "others"),
        (["-m", "service.grammar.worker"], "others"),
    ],
)
def test_a_process_has_the_role_of_its_command(words: list[str], role: str) -> None:
    wait = [sys.executable, "-c", "input()", *words]
    with subprocess.Popen(wait, stdin=subprocess.PIPE) as child:
        found = {item.pid: role for role, items in processes.by_role().items() for item in items}
        child.communicate(b"\n")
    assert found[child.pid] == role


def test_every_point_has_a_cell_in_each_column() -> None:
    sample = Sample(due=0.0, sent=0.1, arrivals=(0.5, 0.7), ended=0.7)
    point = Point(
        replicas=2,
        workers=1,
        face="grpc",
        rate=5,
        calls=1,
        tokens=2,
        seconds=0.7,
        cpu_s={"engine": 0.35, "service": 0.07, "envoy": 0.0, "others": 0.0},
        busiest={},
        summary=summarise([sample], 2),
    )
    row = dict(zip(HEADER[1:], cells(point)[1:], strict=False))
    assert len(cells(point)) == len(HEADER)
    assert row["replicas x workers"] == "2 x 1"
    assert row["engine"] == "50%"
    assert row["first p50 ms"] == "500.0"


def test_a_load_is_an_open_loop() -> None:
    sizes = Sizes(rates=[5], requests=10, input_tokens=8, output_tokens=4)
    options = sizes.options(parse_target("http://127.0.0.1:80"), 5)
    assert options.rate == 5
    assert options.concurrency is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--replicas", "0"),
        ("--workers", "x"),
        ("--rates", "0"),
        ("--rates", "inf"),
        ("--requests", "0"),
        ("--echo", "x"),
    ],
)
def test_numbers_that_no_load_has_are_refused(
    flag: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scale", flag, value])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"argument {flag}: must be a " in capsys.readouterr().err
