"""The command itself: at a terminal a conversation, in a pipe one question and its answer."""

from __future__ import annotations

import contextlib
import sys

from .answer import ChatError, Server
from .conversation import Conversation
from .options import ChatOptions
from .screen import Screen
from .session import Session


def run(options: ChatOptions) -> int:
    """Talks until the input ends; returns the exit code.

    Raises:
        ChatError: the server does not answer, or in a pipe refuses the question.
    """
    with contextlib.closing(_server(options)) as server:
        screen = Screen()
        conversation = Conversation(options.system, options.parameters, options.tools)
        session = Session(server, conversation, screen)
        if not sys.stdin.isatty():
            session.ask_once(_question())
            return 0
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - `input` edits lines with it
        screen.note(f"{server.model()} at {options.target.url}; /help lists commands")
        session.run()
    return 0


def _question() -> str:
    if not (text := sys.stdin.read().strip()):
        raise ChatError("there is no question on the standard input")
    return text


def _server(options: ChatOptions) -> Server:
    if options.target.transport == "grpc":
        from .grpc_server import GrpcServer

        return GrpcServer(options.target, options.credentials)
    from .rest_server import RestServer

    return RestServer(options.target, options.credentials)
