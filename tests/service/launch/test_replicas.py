"""Several engines: their sockets, and what each of them runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.protocol.notify import READY, notify
from service.launch import replicas as replicas_module
from service.launch.plan import make_plan
from service.launch.replicas import make_replicas, visible_gpus
from service.launch.settings import Settings, SettingsError

SOCKET = Path("/run/engine.sock")


def settings(count: int, **changes: Any) -> Settings:
    return Settings(engine_socket=SOCKET, replicas=count, **changes)


def on_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int, usable: int | None = None, gpus: int = 0
) -> None:
    """A machine with so many cores, of which a quota leaves fewer, and GPUs."""
    monkeypatch.setattr(replicas_module, "AFFINITY", set(range(cores)))
    monkeypatch.setattr(replicas_module, "num_processors", lambda: usable or cores)
    monkeypatch.setattr(
        replicas_module, "visible_gpus", lambda _: [str(index) for index in range(gpus)]
    )


def test_the_only_engine_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, 8, gpus=4)
    (only,) = make_replicas(settings(1))
    assert (only.name, only.settings) == ("engine", settings(1))
    assert not only.environment
    assert not only.processors


def test_engines_have_numbered_sockets() -> None:
    assert settings(1).engine_sockets == (SOCKET,)
    assert settings(2).engine_sockets == (Path("/run/engine-1.sock"), Path("/run/engine-2.sock"))
    with pytest.raises(SettingsError, match="`engine_socket` must be <= 107 bytes"):
        Settings(engine_socket=Path("/" + "x" * 106), replicas=10)


@pytest.mark.parametrize(
    ("cores", "count", "groups", "threads"),
    [
        (8, 2, [{0, 1, 2, 3}, {4, 5, 6, 7}], 4),
        (10, 3, [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}], 3),  # one is left to the service
        (3, 3, [{0}, {1}, {2}], 1),
        (2, 3, [set(), set(), set()], 1),  # too few: none is bound
    ],
)
def test_engines_on_a_cpu_have_a_group_of_cores_each(
    monkeypatch: pytest.MonkeyPatch, cores: int, count: int, groups: list[set[int]], threads: int
) -> None:
    on_machine(monkeypatch, cores)
    made = make_replicas(settings(count))
    assert [one.processors for one in made] == groups
    assert {one.settings.num_threads for one in made} == {threads}
    assert not any(one.environment for one in made)


def test_a_quota_is_shared_by_threads_and_binds_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, 64, usable=8)
    made = make_replicas(settings(2))
    assert [(one.settings.num_threads, one.processors) for one in made] == [(4, set())] * 2


@pytest.mark.parametrize(("threads", "is_bound"), [(1, True), (4, True), (5, False)])
def test_threads_that_are_given_are_those_of_each_engine(
    monkeypatch: pytest.MonkeyPatch, threads: int, is_bound: bool
) -> None:
    on_machine(monkeypatch, 8)
    made = make_replicas(settings(2, num_threads=threads))
    assert [one.settings.num_threads for one in made] == [threads] * 2
    assert [bool(one.processors) for one in made] == [is_bound] * 2


def test_parts_of_a_divided_model_share_the_group_of_their_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_machine(monkeypatch, 8)
    made = make_replicas(settings(2, num_shard=2))
    assert [(one.settings.num_threads, len(one.processors)) for one in made] == [(2, 4)] * 2


@pytest.mark.parametrize(
    ("gpus", "shards", "visible"),
    [(2, 1, ["0", "1"]), (5, 2, ["0,1", "2,3"]), (4, 2, ["0,1", "2,3"])],
)
def test_engines_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, gpus: int, shards: int, visible: list[str]
) -> None:
    on_machine(monkeypatch, 8, gpus=gpus)
    made = make_replicas(settings(2, num_shard=shards))
    assert [one.environment for one in made] == [{"CUDA_VISIBLE_DEVICES": ids} for ids in visible]
    assert not any(one.processors for one in made)
    assert [one.settings.num_threads for one in made] == [None, None]


@pytest.mark.parametrize(
    ("gpus", "changes", "text"),
    [
        (1, {}, "`replicas` 2 with 1 GPU each need 2 GPUs, and there are 1;"),
        (3, {"num_shard": 2}, "`replicas` 2 with 2 GPUs each need 4 GPUs, and there are 3;"),
        (0, {"device": "cuda"}, "`replicas` 2 with 1 GPU each need 2 GPUs, and there are 0;"),
    ],
)
def test_too_few_gpus_are_told(
    monkeypatch: pytest.MonkeyPatch, gpus: int, changes: dict[str, Any], text: str
) -> None:
    on_machine(monkeypatch, 8, gpus=gpus)
    with pytest.raises(ValueError, match=text):
        make_replicas(settings(2, **changes))


def test_gpus_are_not_looked_at_for_engines_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, 8, gpus=8)
    assert all(one.processors for one in make_replicas(settings(2, device="cpu")))


@pytest.mark.parametrize(
    ("given", "visible"),
    [
        ("0,3", ["0", "3"]),
        ("GPU-8932f937, GPU-1bca6a3b", ["GPU-8932f937", "GPU-1bca6a3b"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_that_the_environment_names_are_those_to_use(given: str, visible: list[str]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": given}) == visible


def test_gpus_are_found_by_their_device_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("nvidia3", "nvidia5", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(replicas_module, "_DEVICE_FILES", tmp_path)
    assert visible_gpus({}) == ["0", "1"], "as CUDA counts those that a container has"


def test_gpus_without_device_files_are_those_that_the_tool_lists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU 0: X\\n  MIG 1g\\nGPU 1: Y\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(replicas_module, "_DEVICE_FILES", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == ["0", "1"]


def test_the_plan_starts_each_engine_and_tells_the_services_of_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_machine(monkeypatch, 4)
    plan = make_plan(Settings(port=1, grpc_port=2, replicas=2, service_workers=2), tmp_path)
    engines = ["engine-1", "engine-2"]
    assert list(plan.commands) == [*engines, "service-1", "service-2", "envoy"]
    for number, name in enumerate(engines, start=1):
        assert f"--engine-socket={tmp_path / f'engine-{number}.sock'}" in plan.commands[name]
        assert "--num-threads=2" in plan.commands[name]
    for name in ("service-1", "service-2"):
        assert f"--engine-socket={tmp_path / 'engine.sock'}" in plan.commands[name]
        assert "--replicas=2" in plan.commands[name]
    assert plan.processors == {"engine-1": {0, 1}, "engine-2": {2, 3}}
    assert set(plan.signs_of_life) == set(plan.commands)
    assert not set(engines) & set(plan.environments)


async def test_a_server_of_several_engines_has_loaded_once_all_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def serving(_: object) -> bool:
        return True

    monkeypatch.setattr("service.launch.plan._are_serving", serving)
    on_machine(monkeypatch, 1)
    plan = make_plan(Settings(port=1, grpc_port=2, replicas=2), tmp_path)
    for name in ("engine-1", "engine-2"):
        assert not await plan.stages[0].reached()
        watch = plan.signs_of_life[name]
        monkeypatch.setenv("NOTIFY_SOCKET", watch.environment["NOTIFY_SOCKET"])
        notify(READY)
        assert await watch.has_sign()
    assert await plan.stages[0].reached()
