"""docker-compose.yml: commands that exist, one place for settings, and an end in good order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from service.cli import _COMMANDS, _make_parser
from service.launch.settings import Settings
from service.launch.sources import load
from tests.deploy.dockerfile import stages
from tests.paths import REPOSITORY

DOCUMENT = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]
EXAMPLE = REPOSITORY / "deploy" / "tokenwire.env.example"
# What the Compose specification has, as far as it is used here.
TOP_LEVEL = {"services", "volumes"}
OF_A_SERVICE = {
    *("build", "cap_drop", "command", "depends_on", "deploy", "env_file", "healthcheck", "image"),
    *("init", "networks", "ports", "profiles", "read_only", "restart", "security_opt", "shm_size"),
    *("stop_grace_period", "tmpfs", "volumes"),
}
OF_A_HEALTHCHECK = {"test", "interval", "timeout", "start_period"}

each_service = pytest.mark.parametrize("name", SERVICES)


def settings(command: list[str]) -> Settings:
    """The settings of a container without a file of settings."""
    arguments = vars(_make_parser().parse_args(command))
    assert arguments.pop("command") in _COMMANDS
    return load(arguments, {})


def seconds(text: str) -> float:
    """A duration, or the default of a variable that is one."""
    match = re.fullmatch(r"(?:\$\{\w+:-)?(\d+)s\}?", text)
    assert match is not None, text
    return float(match[1])


def test_words_are_those_of_the_specification() -> None:
    assert {name for name in DOCUMENT if not name.startswith("x-")} == TOP_LEVEL
    for service in SERVICES.values():
        assert service.keys() <= OF_A_SERVICE
        assert service["healthcheck"].keys() <= OF_A_HEALTHCHECK


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_has_the_three_processes_of_one_image(profile: str) -> None:
    members = {name: item for name, item in SERVICES.items() if item["profiles"] == [profile]}
    assert [item["command"][0] for item in members.values()] == ["engine", "service", "envoy"]
    (build,) = {str(item["build"]) for item in members.values()}
    (image,) = {item["image"] for item in members.values()}
    device = "cpu" if profile == "cpu" else "cuda"
    assert image == f"tokenwire:{device}"
    assert f"'DEVICE': '{device}'" in build
    for item in members.values():
        assert set(item.get("depends_on", ())) <= members.keys()


@each_service
def test_commands_are_commands_that_exist_and_find_each_other(name: str) -> None:
    command = SERVICES[name]["command"]
    found = settings(command)
    if command[0] == "engine":
        assert str(found.engine_socket) == "/run/tokenwire/engine.sock"
        assert SERVICES[name]["healthcheck"]["test"][-1] == str(found.engine_socket)
    elif command[0] == "service":
        assert str(found.engine_socket) == "/run/tokenwire/engine.sock"
        assert found.gateway_addresses == ["0.0.0.0:50052"]
        assert SERVICES[name]["networks"]["default"]["aliases"] == ["service"]
    else:
        assert (found.upstream_host, found.gateway_port) == ("service", 50052)
        assert SERVICES[name]["ports"] == [f"${{PUBLIC_PORT:-8080}}:{found.port}"]


@each_service
def test_health_is_asked_where_the_container_listens(name: str) -> None:
    item = SERVICES[name]
    kind, *words = item["healthcheck"]["test"]
    assert kind == "CMD"
    if item["command"][0] == "engine":
        assert words[:2] == ["test", "-S"]
        return
    assert words[0] == "tokenwire"
    own = settings(item["command"])
    port = own.gateway_port if item["command"][0] == "service" else own.port
    assert settings(words[1:]).probe_target == f"127.0.0.1:{port}"


@each_service
def test_all_read_their_settings_from_one_file_when_they_start(name: str) -> None:
    assert SERVICES[name]["env_file"] == [{"path": "tokenwire.env", "required": False}]
    assert "environment" not in SERVICES[name]


def test_the_example_of_that_file_has_settings_that_exist() -> None:
    lines = [line.removeprefix("# ") for line in EXAMPLE.read_text().splitlines()]
    pairs = dict(line.split("=") for line in lines if re.fullmatch(r"[A-Z_]+=\S*", line))
    assert {"MODEL_ID", "TOKENWIRE_API_KEY_FILE"} <= pairs.keys()
    found = load({}, pairs)
    assert found.model_id == pairs["MODEL_ID"]
    assert found.tls is not None
    assert str(found.api_key_file) == pairs["TOKENWIRE_API_KEY_FILE"]


@each_service
def test_a_container_has_time_to_drain(name: str) -> None:
    assert seconds(SERVICES[name]["stop_grace_period"]) >= Settings().drain_seconds + 15


def test_the_gateway_ends_first_and_the_engine_last() -> None:
    for suffix in ("", "-gpu"):
        assert set(SERVICES[f"gateway{suffix}"]["depends_on"]) == {f"service{suffix}"}
        assert set(SERVICES[f"service{suffix}"]["depends_on"]) == {f"engine{suffix}"}


@each_service
def test_containers_can_write_only_where_they_must(name: str) -> None:
    item = SERVICES[name]
    assert (item["read_only"], item["cap_drop"]) == (True, ["ALL"])
    assert item["security_opt"] == ["no-new-privileges:true"]
    places = {volume.split(":")[-1 if volume.count(":") == 1 else -2] for volume in item["volumes"]}
    assert places - {"/etc/tokenwire"} == set(
        stages(REPOSITORY / "Dockerfile")["server"].words("VOLUME")
    )
    named = {volume.partition(":")[0] for volume in item["volumes"] if volume[0].isalpha()}
    assert named == DOCUMENT["volumes"].keys()
