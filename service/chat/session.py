"""A conversation at a prompt: questions, answers, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import difflib
import json
import shlex
from collections.abc import Callable
from pathlib import Path

from .answer import ChatError, Server
from .calls import Call, CallPart, whole_calls
from .conversation import Conversation
from .parameters import read_parameter
from .screen import Screen
from .tools import read_tools, tool_name

HELP = """/help                    this text
/new                     begin a new conversation
/system TEXT             what the model is told first; without a text, nothing
/params NAME=VALUE ...   parameters of answers, e.g. temperature=0.7; NAME= restores the default
/tools on|off|FILE       what the model may call; you type what its calls return
/regenerate              answer the last question again
/save FILE               write the conversation as JSON
/quit                    end, as Ctrl-D does; Ctrl-C stops an answer"""

_CALLS = "tool_calls"  # why an answer ends that has calls, all of them whole


class Session:
    """A conversation with a server.

    Args:
        server: who answers.
        conversation: what was said so far.
        screen: where answers are shown.
        read: shows a prompt and returns the next line.
    """

    def __init__(
        self,
        server: Server,
        conversation: Conversation,
        screen: Screen,
        read: Callable[[str], str] = input,
    ) -> None:
        self._server, self._conversation = server, conversation
        self._screen, self._read = screen, read
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/new": self._new,
            "/system": self._system,
            "/params": self._params,
            "/tools": self._tools,
            "/regenerate": self._regenerate,
            "/save": self._save,
        }

    def run(self) -> None:
        """Reads and answers until the input ends, `/quit`, or Ctrl-C at the prompt."""
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while (line := self._read(self._screen.prompt()).strip()) != "/quit":
                self._handle(line)
            return
        self._screen.note("")  # the prompt's line has not ended

    def ask(self, text: str) -> None:
        """Asks, and shows the answer; whoever types tells what calls return.

        Raises:
            ChatError: there is none; the question is forgotten.
        """
        self._conversation.ask(text)
        self._answer()

    def ask_once(self, text: str) -> None:
        """Asks, and writes the answer with its calls, which nobody is there to make.

        Raises:
            ChatError: there is none.
        """
        self._conversation.ask(text)
        self._screen.write_calls(self._next_answer())

    def _handle(self, line: str) -> None:
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self.ask(line)
        except (ChatError, OSError, ValueError) as error:
            self._screen.error(str(error))

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
            return
        close = difflib.get_close_matches(name, [*self._commands, "/quit"], n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists them"
        raise ValueError(f"unknown command {name}; {hint}")

    def _answer(self) -> None:
        """Answers the open question, by way of the calls that the model makes."""
        while calls := self._next_answer():
            try:
                for call in calls:
                    self._conversation.returned(call, self._result_of(call))
            except KeyboardInterrupt:
                self._conversation.forget_question()
                self._screen.note("\n(left unanswered; the question is forgotten)")
                return

    def _result_of(self, call: Call) -> str:
        """Shows a call, and reads what it returns."""
        self._screen.note(f"{call.name} {call.arguments}")
        return self._read(self._screen.prompt("returns: ")).strip()

    def _next_answer(self) -> list[Call]:
        """The next answer, as it is shown; returns its calls. What came before Ctrl-C is kept."""
        texts: list[str] = []
        parts: list[CallPart] = []
        why = ""
        pieces = self._server.answer(self._conversation.request)
        try:
            for piece in pieces:
                self._screen.show(piece)
                texts.append(piece.text)
                parts.extend(piece.calls)
                why = piece.finish_reason or why
        except KeyboardInterrupt:
            why = "stopped"
        except ChatError:
            self._conversation.forget_question()
            raise
        finally:
            pieces.close()
        calls = whole_calls(parts) if why == _CALLS else []
        self._screen.end_answer(has_text=not calls)
        self._conversation.answered("".join(texts), calls)
        if why in _ENDINGS:
            self._screen.note(_ENDINGS[why])
        return calls

    def _help(self, _: str) -> None:
        self._screen.note(HELP)

    def _new(self, _: str) -> None:
        self._conversation.clear()
        self._screen.note("A new conversation.")

    def _system(self, text: str) -> None:
        self._conversation.system = text
        self._screen.note("The model is told that first." if text else "The model is told nothing.")

    def _params(self, text: str) -> None:
        changes = dict(read_parameter(item) for item in shlex.split(text))
        self._conversation.set_parameters(changes)
        self._screen.note(json.dumps(self._conversation.parameters, ensure_ascii=False))

    def _tools(self, text: str) -> None:
        conversation = self._conversation
        if text not in ("", "on", "off"):
            conversation.tools = read_tools(text)
        if not conversation.tools:
            raise ValueError("there are no tools; /tools FILE reads some")
        if text:
            conversation.tools_are_on = text != "off"
        names = ", ".join(map(tool_name, conversation.tools))
        self._screen.note(f"Tools are {'on' if conversation.tools_are_on else 'off'}: {names}")

    def _regenerate(self, _: str) -> None:
        if not self._conversation.forget_answer():
            raise ValueError("there is no answer yet")
        self._answer()

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file")
        text = json.dumps(self._conversation.content, ensure_ascii=False, indent=2) + "\n"
        Path(name).expanduser().write_text(text, encoding="utf-8")
        self._screen.note(f"Saved to {name}.")


_ENDINGS = {
    "stopped": "(stopped)",
    "length": "(cut: the limit on new tokens; /params max_tokens=1000 raises it)",
}
