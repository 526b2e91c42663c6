"""`tokenwire serve` with engines that have no model: supervisor, services and Envoy are real.

python -m benchmarks.echo_server SECONDS_PER_STEP --service-workers=2 --replicas=2 …
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from service.command_line.parser import Parser
from service.launch.plan import Plan, make_plan
from service.launch.replicas import make_replicas
from service.launch.settings import Settings
from service.launch.sources import add_arguments, load
from service.launch.supervisor import Supervisor
from service.log_lines import set_up_logging

_VOCAB_SIZE = 4096  # of the bundled model


def main() -> None:
    interval, *flags = sys.argv[1:]
    parser = Parser(prog="echo_server")
    add_arguments(parser)
    parser.add_argument("--watch", help="a file for what `watched_service` says of event loops")
    arguments = vars(parser.parse_args(flags))
    watch: str | None = arguments.pop("watch")
    settings = load(arguments, {})
    set_up_logging(settings.log_level, json_output=False)

    def plan(settings: Settings, runtime: Path) -> Plan:
        whole = make_plan(settings, runtime)
        command = [sys.executable, "-m", "benchmarks.echo_engine"]
        engines = {
            one.name: [*command, str(one.settings.engine_socket), interval, str(_VOCAB_SIZE)]
            for one in make_replicas(replace(settings, engine_socket=runtime / "engine.sock"))
        }
        commands = {**whole.commands, **engines}
        if watch is not None:
            commands = {name: _watched(command, watch) for name, command in commands.items()}
        return replace(whole, commands=commands)

    sys.exit(asyncio.run(Supervisor(settings, plan=plan).run()))


def _watched(command: list[str], path: str) -> list[str]:
    """A command with the watched service in place of the service."""
    if "service.cli" not in command or "service" not in command:
        return command
    at = command.index("service.cli")
    return [*command[:at], "benchmarks.watched_service", path, *command[at + 1 :]]


if __name__ == "__main__":
    main()
