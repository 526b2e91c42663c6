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
    settings = load(vars(parser.parse_args(flags)), {})
    set_up_logging(settings.log_level, json_output=False)

    def plan(settings: Settings, runtime: Path) -> Plan:
        whole = make_plan(settings, runtime)
        command = [sys.executable, "-m", "benchmarks.echo_engine"]
        engines = {
            one.name: [*command, str(one.settings.engine_socket), interval, str(_VOCAB_SIZE)]
            for one in make_replicas(replace(settings, engine_socket=runtime / "engine.sock"))
        }
        return replace(whole, commands={**whole.commands, **engines})

    sys.exit(asyncio.run(Supervisor(settings, plan=plan).run()))


if __name__ == "__main__":
    main()
