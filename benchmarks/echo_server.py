"""`tokenwire serve` with an engine that has no model: supervisor, services and Envoy are real.

python -m benchmarks.echo_server SECONDS_PER_STEP --service-workers=2 …
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from service.command_line.parser import Parser
from service.launch.plan import Plan, make_plan
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
        engine = [sys.executable, "-m", "benchmarks.echo_engine"]
        arguments = [str(runtime / "engine.sock"), interval, str(_VOCAB_SIZE)]
        return replace(whole, commands={**whole.commands, "engine": [*engine, *arguments]})

    sys.exit(asyncio.run(Supervisor(settings, plan=plan).run()))


if __name__ == "__main__":
    main()
