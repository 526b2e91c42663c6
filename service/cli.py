"""The command `tokenwire`: reads the settings, sets up logging and runs one of the processes.

`tokenwire bench` and `tokenwire chat` are clients of a running server and `tokenwire key` needs
none, so these have options of their own.

A command's modules are imported when it runs, so that `--help` and the supervisor need few of them.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engine.protocol.errors import EngineError

from .access.keys import key_line, make_key
from .bench.options import add_arguments as add_bench_arguments
from .bench.options import from_arguments as bench_options
from .bundled import DESCRIPTORS
from .chat.options import add_arguments as add_chat_arguments
from .chat.options import from_arguments as chat_options
from .command_line.completion import SHELLS, script
from .command_line.parser import EXIT_USAGE, Parser, parse
from .launch.files import check_files, check_model
from .launch.groups import own_settings
from .launch.lone_gateway import run as run_gateway
from .launch.open_files import raise_limit
from .launch.options import SettingsError
from .launch.place import own_place
from .launch.plan import (
    admin_address,
    envoy_command,
    envoy_configuration,
    following_servers,
    is_serving,
)
from .launch.private_directory import private_directory
from .launch.settings import Settings
from .launch.sources import add_arguments, load, wants_json
from .launch.supervisor import Supervisor, SupervisorError
from .launch.unsupported import unsupported_variables
from .log_lines import set_up_logging, write_json_only
from .parent import ignore_hangup

logger = logging.getLogger(f"{__package__}.cli")  # __name__ is `__main__` when run with -m

_EXIT_INTERRUPTED = 130  # as shells report a process that SIGINT ended


def main(argv: list[str] | None = None) -> int:
    """Runs `tokenwire` and returns its exit code: 1 for a failure, 2 for wrong settings."""
    arguments = vars(parse(_make_parser(), sys.argv[1:] if argv is None else argv))
    name: str = arguments.pop("command")
    try:
        if name in _CLIENT_COMMANDS:
            return _CLIENT_COMMANDS[name](arguments)
        if name in _WARNING_COMMANDS and wants_json(arguments, os.environ):
            write_json_only()
        settings = load(arguments, os.environ)
        place = own_place()
        worker = None if place is None else place.number
        set_up_logging(settings.log_level, json_output=settings.json_output, worker=worker)
        if name in _WARNING_COMMANDS:
            for warning in unsupported_variables(os.environ):
                logger.warning("%s", warning)
        return _COMMANDS[name][0](settings)
    except SettingsError as error:
        return _fail(name, error, EXIT_USAGE)
    except (EngineError, SupervisorError, OSError, ValueError) as error:
        logger.debug("the cause:", exc_info=True)
        return _fail(name, error, 1)


def _make_parser() -> Parser:
    parser = Parser(
        prog="tokenwire",
        description="Text generation over gRPC and TGI's REST API.",
        epilog="tokenwire COMMAND --help has the settings of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tokenwire {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    add = partial(_add_command, commands)
    for name, (_, text) in _COMMANDS.items():
        command = add(name, text, usage=f"tokenwire {name} [setting ...]", epilog=_EPILOG)
        add_arguments(command, own_settings(name))
    add_bench_arguments(add(_BENCH, "Measure a running server, over REST or gRPC."))
    add_chat_arguments(add(_CHAT, "Talk to a running server, over REST or gRPC."))
    key = add(_KEY, "Make an API key: prints the line for --api-key-file, and the key on stderr.")
    key.add_argument("name", help="whose key it is; log lines and metrics will have this name")
    shell = add(_COMPLETION, "Print a script that completes commands and flags in a shell.")
    shell.add_argument("shell", choices=tuple(SHELLS), help="the shell to print it for")
    return parser


def _add_command(commands: Any, name: str, text: str, **keywords: str) -> Parser:
    parser: Parser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False, **keywords
    )
    return parser


def _serve(settings: Settings) -> int:
    check_files(settings)  # before ports are looked at: it is what a first start gets wrong
    return asyncio.run(_supervise(settings))


async def _supervise(settings: Settings) -> int:
    return await Supervisor(settings).run()


def _engine(settings: Settings) -> int:
    socket_path = _socket_path(settings)
    check_model(settings)
    signal.signal(signal.SIGHUP, ignore_hangup)
    from engine.server import serve

    serve(settings.engine_config(socket_path))
    return 0


def _service(settings: Settings) -> int:
    _socket_path(settings)
    check_model(settings)
    signal.signal(signal.SIGHUP, ignore_hangup)
    _hide_torch()
    gc.disable()  # modules are no garbage, and would be visited again and again
    from .api.wakeups import GrpcEventLoop
    from .app import serve

    gc.enable()
    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        runner.run(serve(settings))
    return 0


def _hide_torch() -> None:
    """Keeps transformers from importing torch, which takes 2 s and 300 MB, for tokenizers alone."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that it finds no torch
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed


def _envoy(settings: Settings) -> int:
    if (warning := raise_limit(settings.gateway_config(DESCRIPTORS).max_connections)) is not None:
        logger.warning("%s", warning)
    with private_directory() as directory:
        command = envoy_command(settings, directory)
        admin = admin_address(settings, directory)
        watch = following_servers(settings, directory)
        return asyncio.run(run_gateway(command, admin, settings.drain_seconds, watch))


def _envoy_config(settings: Settings) -> int:
    sys.stdout.write(envoy_configuration(settings))
    return 0


def _health(settings: Settings) -> int:
    if settings.grpc_tls is not None and not settings.gateway_addresses:
        raise SettingsError("--gateway-socket or --gateway-port is needed where gRPC has TLS")
    serving = asyncio.run(is_serving(settings.probe_target))
    sys.stdout.write("serving\n" if serving else "not serving\n")
    return 0 if serving else 1


def _bench(arguments: dict[str, Any]) -> int:
    options = bench_options(arguments)
    try:
        from .bench.command import run

        return run(options)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def _chat(arguments: dict[str, Any]) -> int:
    options = chat_options(arguments)
    try:
        from .chat.command import run

        return run(options)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def _key(arguments: dict[str, Any]) -> int:
    key = make_key()
    sys.stdout.write(key_line(arguments["name"], key) + "\n")
    sys.stderr.write(f"{key}\n")
    return 0


def _completion(arguments: dict[str, Any]) -> int:
    sys.stdout.write(script(_make_parser(), arguments["shell"]))
    return 0


_EPILOG = "Settings of the other commands are taken as well, so that one file may serve them all."
_BENCH, _CHAT, _KEY, _COMPLETION = "bench", "chat", "key", "completion"
_CLIENT_COMMANDS = {
    _BENCH: _bench,
    _CHAT: _chat,
    _KEY: _key,
    _COMPLETION: _completion,
}  # those that are not about a server's settings
_COMMANDS: dict[str, tuple[Callable[[Settings], int], str]] = {
    "serve": (_serve, "Run engine, service and Envoy, and restart what dies."),
    "engine": (_engine, "Run the engine alone."),
    "service": (_service, "Run the gRPC service alone."),
    "envoy": (_envoy, "Run Envoy alone."),
    "envoy-config": (_envoy_config, "Print Envoy's configuration."),
    "health": (_health, "Ask the service whether it serves: exit code 0 if so, otherwise 1."),
}
_WARNING_COMMANDS = ("serve", "engine", "service", "envoy")  # those whose output no script parses


def _socket_path(settings: Settings) -> Path:
    if settings.engine_socket is None:
        raise SettingsError("--engine-socket is needed where engine and service run alone")
    return settings.engine_socket


def _fail(command: str, error: Exception, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"tokenwire {command}: {text}\n")
    return code


def _version() -> str:
    try:
        return importlib.metadata.version("tokenwire")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
