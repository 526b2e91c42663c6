"""A conversation: what was said, by whom, and how the next answer is asked for."""

from __future__ import annotations

from typing import Any


class Conversation:
    """A conversation.

    Args:
        system: what comes before everything; empty for nothing.
        parameters: of every request, by name.
    """

    def __init__(self, system: str = "", parameters: dict[str, Any] | None = None) -> None:
        self.system = system
        self.parameters = dict(parameters or {})
        self._turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it, as the server wants it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self._turns]

    @property
    def request(self) -> dict[str, Any]:
        """What asks for the next answer, as JSON for `/v1/chat/completions`."""
        return {"model": "default", "messages": self.messages, "stream": True} | self.parameters

    def ask(self, text: str) -> None:
        """Adds a question."""
        self._turns.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """Adds the answer."""
        self._turns.append({"role": "assistant", "content": text})

    def forget_question(self) -> None:
        """Takes a question back that was not answered."""
        self._turns.pop()

    def forget_answer(self) -> bool:
        """Takes the last answer back, whose question is open again; False if there is none."""
        if not self._turns:
            return False
        self._turns.pop()
        return True

    def clear(self) -> None:
        """Forgets what was said, but not the system's text and the parameters."""
        self._turns.clear()

    def set_parameters(self, changes: dict[str, Any]) -> None:
        """Sets parameters; None removes one."""
        merged = self.parameters | changes
        self.parameters = {name: value for name, value in merged.items() if value is not None}
