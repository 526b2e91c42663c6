"""What help shows of the settings."""

from __future__ import annotations

import pytest

from service import cli
from service.command_line.parser import commands_of
from service.launch.groups import _GROUPS, grouped, own_settings
from service.launch.settings import OPTIONS


def test_every_setting_is_in_one_group() -> None:
    listed = [option for _, options in grouped() for option in options]
    assert listed == list(OPTIONS)
    assert [title for title, _ in grouped()] == list(_GROUPS.values())


@pytest.mark.parametrize(
    ("command", "has", "lacks"),
    [
        ("serve", {"port", "speculate", "max_tools", "drain_seconds"}, set()),
        ("engine", {"model_id", "quantize", "max_loras", "engine_socket"}, {"port", "max_tools"}),
        ("service", {"model_id", "admin_key_file", "max_tools"}, {"quantize", "max_loras"}),
        ("envoy", {"port", "tls_key", "gateway_port", "admin_port"}, {"model_id", "max_tools"}),
        ("health", {"grpc_port", "gateway_socket"}, {"port", "model_id"}),
    ],
)  # fmt: skip
def test_a_command_shows_the_settings_that_it_reads(
    command: str, has: set[str], lacks: set[str]
) -> None:
    own = own_settings(command)
    assert has | {"log_level", "json_output"} <= own
    assert not lacks & own
    text = commands_of(cli._make_parser())[command].format_help()
    for option in OPTIONS:
        assert (f"\n  {option.flags[0]} " in text) == (option.name in own)


def test_every_setting_is_shown_by_a_process_of_its_own() -> None:
    of_supervisor = {"engine_stall_seconds", "service_workers"}
    shown = own_settings("engine") | own_settings("service") | own_settings("envoy")
    assert {option.name for option in OPTIONS} - shown == of_supervisor
